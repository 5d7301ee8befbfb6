// The program in the pods of `cargo lab cluster`, static and without a base image. Its first argument
// selects what it does; a link named `tar` makes it the part of tar that `kubectl cp` needs.
package main

import (
	"archive/tar"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// limit is the longest time of one request.
const limit = 5 * time.Second

func main() {
	if err := run(os.Args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if filepath.Base(args[0]) == "tar" {
		return archive(args[1:])
	}
	if len(args) < 2 {
		return fmt.Errorf("usage: testpod pause | serve NAME | webhook CERTIFICATE KEY | get URL TEXT | resolve SERVER NAME | cat FILE")
	}
	switch command, rest := args[1], args[2:]; {
	case command == "pause":
		return pause()
	case command == "serve" && len(rest) == 1:
		return serve(rest[0])
	case command == "webhook" && len(rest) == 2:
		return webhook(rest[0], rest[1])
	case command == "get" && len(rest) == 2:
		return get(rest[0], rest[1])
	case command == "resolve" && len(rest) == 2:
		return resolve(rest[0], rest[1])
	case command == "cat" && len(rest) == 1:
		text, err := os.ReadFile(rest[0])
		if err == nil {
			_, err = os.Stdout.Write(text)
		}
		return err
	}
	return fmt.Errorf("unknown arguments %q", args[1:])
}

// pause waits for a signal, and reaps the children of its PID namespace.
func pause() error {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGCHLD)
	for got := range signals {
		if got != syscall.SIGCHLD {
			return nil
		}
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
	return nil
}

// serve answers HTTP on port 8080 with its name and what it was sent, and DNS on port 5353 with 192.0.2.1.
func serve(name string) error {
	fmt.Printf("hello from %s\n", name)
	go func() {
		stop := make(chan os.Signal, 1)
		signal.Notify(stop, syscall.SIGTERM)
		<-stop
		os.Exit(0)
	}()
	failed := make(chan error)
	go func() { failed <- dns() }()
	go func() {
		failed <- http.ListenAndServe(":8080", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			text, _ := io.ReadAll(io.LimitReader(r.Body, 1<<20))
			fmt.Fprintf(w, "%s\n%s", name, text)
		}))
	}()
	return <-failed
}

// dns answers every question of RFC 1035 with one address.
func dns() error {
	socket, err := net.ListenPacket("udp", ":5353")
	if err != nil {
		return err
	}
	buffer := make([]byte, 512)
	for {
		length, from, err := socket.ReadFrom(buffer)
		if err != nil {
			return err
		}
		// The header has 12 bytes; the name of the question ends with an empty label, type and class follow.
		end := 12
		for end < length && buffer[end] != 0 {
			end += 1 + int(buffer[end])
		}
		if end += 5; end > length {
			continue
		}
		answer := append([]byte{}, buffer[:end]...)
		binary.BigEndian.PutUint16(answer[2:], 0x8580)
		copy(answer[4:], []byte{0, 1, 0, 1, 0, 0, 0, 0})
		answer = append(answer, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 1)
		if _, err := socket.WriteTo(answer, from); err != nil {
			return err
		}
	}
}

// webhook is an admission webhook on port 8443 that adds an annotation to every object. Certificate and key
// are PEM in base64.
func webhook(certificate, key string) error {
	pem := func(text string) []byte {
		bytes, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return nil
		}
		return bytes
	}
	pair, err := tls.X509KeyPair(pem(certificate), pem(key))
	if err != nil {
		return err
	}
	server := http.Server{
		Addr:      ":8443",
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}},
		Handler:   http.HandlerFunc(admit),
	}
	return server.ListenAndServeTLS("", "")
}

func admit(w http.ResponseWriter, r *http.Request) {
	var review struct {
		Request struct {
			UID string `json:"uid"`
		} `json:"request"`
	}
	if err := json.NewDecoder(io.LimitReader(r.Body, 1<<20)).Decode(&review); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	patch := `[{"op": "add", "path": "/metadata/annotations", "value": {"webhook": "called"}}]`
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{
		"apiVersion": "admission.k8s.io/v1",
		"kind":       "AdmissionReview",
		"response": map[string]any{
			"uid": review.Request.UID, "allowed": true, "patchType": "JSONPatch", "patch": []byte(patch),
		},
	})
}

// get sends a text, and prints the answer.
func get(url, text string) error {
	client := http.Client{Timeout: limit}
	answer, err := client.Post(url, "text/plain", strings.NewReader(text))
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	_, err = io.Copy(os.Stdout, answer.Body)
	return err
}

// resolve asks one DNS server for a name, and prints the addresses.
func resolve(server, name string) error {
	resolver := net.Resolver{
		PreferGo: true,
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "udp", server)
		},
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	addresses, err := resolver.LookupIP(ctx, "ip4", name)
	for _, address := range addresses {
		fmt.Println(address)
	}
	return err
}

// archive creates an archive of one file on standard output (`tar cf - FILE`), or extracts regular files from
// standard input (`tar -xmf - -C DIRECTORY`).
func archive(args []string) error {
	directory, file := ".", ""
	extract := false
	for at := 0; at < len(args); at++ {
		switch word := args[at]; {
		case word == "-C" && at+1 < len(args):
			at++
			directory = args[at]
		case word == "-" || word == "--no-same-permissions" || word == "--no-same-owner":
		case strings.HasPrefix(word, "-x") || strings.HasPrefix(word, "x"):
			extract = true
		case strings.HasPrefix(word, "-c") || word == "cf":
		default:
			file = word
		}
	}
	if !extract {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		writer := tar.NewWriter(os.Stdout)
		header := tar.Header{Name: strings.TrimPrefix(file, "/"), Mode: 0o644, Size: int64(len(text))}
		if err := writer.WriteHeader(&header); err != nil {
			return err
		}
		if _, err := writer.Write(text); err != nil {
			return err
		}
		return writer.Close()
	}
	reader := tar.NewReader(os.Stdin)
	for {
		header, err := reader.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if header.Typeflag != tar.TypeReg {
			continue
		}
		text, err := io.ReadAll(io.LimitReader(reader, 1<<20))
		if err != nil {
			return err
		}
		place := filepath.Join(directory, filepath.Base(header.Name))
		if err := os.WriteFile(place, text, 0o644); err != nil {
			return err
		}
	}
}
