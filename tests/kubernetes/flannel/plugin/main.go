// The CNI plugin of type "flannel" in `cargo lab cluster`. As flannel's own, it gets the pod networks and the MTU of
// the machine from the file that flannel writes, and leaves the work to the plugin "bridge".
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// subnetFile is written by flannel once its backend has started.
const subnetFile = "/run/flannel/subnet.env"

func main() {
	if err := run(); err != nil {
		// The form of errors in the CNI specification; codes from 100 are the plugin's own.
		text, _ := json.Marshal(map[string]any{"cniVersion": "0.4.0", "code": 100, "msg": err.Error()})
		os.Stdout.Write(text)
		os.Exit(1)
	}
}

func run() error {
	var given struct {
		Version string `json:"cniVersion"`
		Name    string `json:"name"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		return fmt.Errorf("cannot read the configuration: %w", err)
	}
	delegate := map[string]any{"cniVersion": given.Version, "name": given.Name, "type": "bridge"}
	if os.Getenv("CNI_COMMAND") != "VERSION" {
		state, err := read(subnetFile)
		if err != nil {
			return err
		}
		if err := configure(delegate, state); err != nil {
			return err
		}
	}
	text, err := json.Marshal(delegate)
	if err != nil {
		return err
	}
	for _, directory := range filepath.SplitList(os.Getenv("CNI_PATH")) {
		program := filepath.Join(directory, "bridge")
		if _, err := os.Stat(program); err != nil {
			continue
		}
		// The result or the error of the delegate goes to standard output.
		command := exec.Command(program)
		command.Stdin, command.Stdout, command.Stderr = bytes.NewReader(text), os.Stdout, os.Stderr
		if command.Run() != nil {
			os.Exit(1)
		}
		return nil
	}
	return fmt.Errorf("there is no plugin bridge in CNI_PATH")
}

// read returns the variables of a file with lines NAME=VALUE.
func read(path string) (map[string]string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("flannel has not started: %w", err)
	}
	state := map[string]string{}
	for _, line := range strings.Split(string(text), "\n") {
		if name, value, found := strings.Cut(line, "="); found {
			state[name] = value
		}
	}
	return state, nil
}

// configure completes the configuration of the plugin bridge.
func configure(delegate map[string]any, state map[string]string) error {
	mtu, err := strconv.Atoi(state["FLANNEL_MTU"])
	if err != nil {
		return fmt.Errorf("cannot parse FLANNEL_MTU: %w", err)
	}
	ranges, routes := []any{}, []any{}
	for _, name := range []string{"FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"} {
		value := state[name]
		if value == "" {
			continue
		}
		_, network, err := net.ParseCIDR(value)
		if err != nil {
			return fmt.Errorf("cannot parse %s: %w", name, err)
		}
		all := "0.0.0.0/0"
		if network.IP.To4() == nil {
			all = "::/0"
		}
		ranges = append(ranges, []any{map[string]any{"subnet": network.String()}})
		routes = append(routes, map[string]any{"dst": all})
	}
	delegate["bridge"] = "cni0"
	delegate["isGateway"] = true
	delegate["hairpinMode"] = true
	delegate["mtu"] = mtu
	delegate["ipam"] = map[string]any{"type": "host-local", "ranges": ranges, "routes": routes}
	return nil
}
