// flannel in `cargo lab cluster`: flannel's own manager of subnets and its backends vxlan and host-gw. Its own
// program also has the backends of clouds, whose libraries are larger than all the rest, and changes rules of
// iptables, which the lab does not need.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/flannel-io/flannel/pkg/backend"
	_ "github.com/flannel-io/flannel/pkg/backend/hostgw"
	_ "github.com/flannel-io/flannel/pkg/backend/vxlan"
	"github.com/flannel-io/flannel/pkg/ipmatch"
	"github.com/flannel-io/flannel/pkg/subnet/kube"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	// Names and meanings are those of flannel's own flags. The environment variable NODE_NAME has the name of the Node.
	link := flag.String("iface", "", "link to the other nodes")
	kubeconfig := flag.String("kubeconfig-file", "", "kubeconfig")
	configuration := flag.String("net-config-path", "", "network configuration, in JSON")
	subnetFile := flag.String("subnet-file", "", "file for the plugin")
	flag.Parse()

	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	subnets, err := kube.NewSubnetManager(ctx, "", *kubeconfig, "flannel.alpha.coreos.com", *configuration, true)
	if err != nil {
		return err
	}
	config, err := subnets.GetNetworkConfig(ctx)
	if err != nil {
		return err
	}
	families, err := ipmatch.GetIPFamily(config.EnableIPv4, config.EnableIPv6)
	if err != nil {
		return err
	}
	external, err := ipmatch.LookupExtIface(*link, "", "", families, ipmatch.PublicIPOpts{})
	if err != nil {
		return err
	}
	chosen, err := backend.NewManager(ctx, subnets, external).GetBackend(config.BackendType)
	if err != nil {
		return err
	}
	var tasks sync.WaitGroup
	network, err := chosen.RegisterNetwork(ctx, &tasks, config)
	if err != nil {
		return err
	}
	lease := network.Lease()
	if err := subnets.HandleSubnetFile(*subnetFile, config, false, lease.Subnet, lease.IPv6Subnet, network.MTU()); err != nil {
		return err
	}
	tasks.Add(1)
	go func() {
		network.Run(ctx)
		tasks.Done()
	}()
	if err := subnets.CompleteLease(ctx, lease, &tasks); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	tasks.Wait()
	return nil
}
