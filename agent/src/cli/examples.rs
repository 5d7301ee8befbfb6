//! Examples of the commands, for their help, the man pages and `docs/cli.md`. A test parses each of
//! them.

pub(super) const TOWLINE: &str = "\
Examples:
  # make this machine a node that survives reboots
  towline join --install --token-file gpu-1.token
  # is it up, by which path, and if not, why not?
  towline status
  towline peers";

pub(super) const JOIN: &str = "\
Examples:
  # set up the machine, join, start the agent, and print the node's address
  towline join --install --token-file gpu-1.token --name gpu-1
  # a control plane: nodes reach it at its public address, clients at two TCP ports
  towline join --install --token-file cp.token --advertise 203.0.113.10:51830 --plain-port 6443 --plain-port 7443
  # over SSH without a console: undone after 300 seconds, unless confirmed
  towline join --install --token-file gpu-1.token --confirm 300";

pub(super) const AGENT: &str = "\
Examples:
  # what towline.service runs
  towline agent
  # one JSON object for each event of the log
  towline agent --log-format json";

pub(super) const RELAY: &str = "\
Examples:
  # on a machine with a public address that has joined
  towline relay";

pub(super) const WAIT: &str = "\
Examples:
  # what the drop-in for the kubelet runs before it
  towline wait --timeout 75
  # until one node in particular is up
  towline wait --peer cp";

pub(super) const STATUS: &str = "\
Examples:
  towline status
  # offloads, candidates and dropped packets too
  towline status -o wide
  # for a script
  towline status -o json";

pub(super) const PEERS: &str = "\
Examples:
  towline peers
  # keys, candidates and conflicts too
  towline peers -o wide
  # again every five seconds
  towline peers --watch 5
  towline peers -o json";

pub(super) const PEER: &str = "\
Examples:
  # why is the direct path not used, and what happened last night?
  towline peer gpu-1
  towline peer gpu-1 -o json";

pub(super) const TOP: &str = "\
Examples:
  # until q is pressed
  towline top";

pub(super) const EVENTS: &str = "\
Examples:
  towline events --since 10m
  # as they happen, one JSON object each
  towline events --follow -o json
  # what happened after the last event that was read
  towline events --after 1764336000000-12";

pub(super) const DOCTOR: &str = "\
Examples:
  towline doctor
  # the checks that do not apply, too
  towline doctor -o wide
  towline doctor -o json";

pub(super) const EXPLAIN: &str = "\
Examples:
  # why is the GPU machine slow?
  towline explain gpu-1
  towline explain gpu-1 -o json";

pub(super) const TRACE: &str = "\
Examples:
  # a node by its name
  towline trace gpu-1
  # a port of a pod
  towline trace 10.244.1.7:8080
  towline trace 10.244.1.7 -o json";

pub(super) const NETCHECK: &str = "\
Examples:
  towline netcheck
  # before the machine joins: any two STUN servers with different addresses
  towline netcheck --reflector 203.0.113.10:7443 --reflector 198.51.100.20:3478
  towline netcheck -o json";

pub(super) const BUNDLE: &str = "\
Examples:
  towline bundle
  # into a file of that name
  towline bundle /root/gpu-1.tar.gz";

pub(super) const PUBKEY: &str = "\
Examples:
  # the public_key of this machine in the [[peer]] section of the other one
  towline pubkey";

pub(super) const PING: &str = "\
Examples:
  towline ping cp
  # ten probes, five in a second
  towline ping gpu-1 --count 10 --interval 200
  # until hole punching has found the direct path
  towline ping gpu-1 --until-direct --count 30
  # by overlay address, for a script
  towline ping 198.19.0.2 -o json";

pub(super) const LEAVE: &str = "\
Examples:
  towline leave
  # no controller can be reached
  towline leave --force";

pub(super) const DOWN: &str = "\
Examples:
  # open the machine, also over a reboot
  towline down
  # close it again
  towline up";

pub(super) const UP: &str = "\
Examples:
  towline up";

pub(super) const CONFIRM: &str = "\
Examples:
  towline join --install --token-file gpu-1.token --confirm 300
  # from a new SSH session, which shows that you can still log in
  towline confirm";

pub(super) const GUARD: &str = "\
Examples:
  # what towline-guard.service runs
  towline guard --watch";

pub(super) const GUARD_LIST: &str = "\
Examples:
  # which networks are reached through the tunnel or not at all, and why?
  towline guard list
  towline guard list -o json";

pub(super) const GUARD_RELEASE: &str = "\
Examples:
  # a node announced a network by mistake, and no longer does
  towline guard release 172.20.0.0/16";

pub(super) const NODE_IP: &str = "\
Examples:
  # the address for the kubelet's --node-ip
  towline node-ip --kubelet
  towline node-ip -4";

pub(super) const CONFIG_CHECK: &str = "\
Examples:
  towline config check
  # a file that is not installed yet
  towline --config new.toml config check";

pub(super) const CONFIG_SHOW: &str = "\
Examples:
  towline config show";

pub(super) const COMPLETIONS: &str = "\
Examples:
  # the package installs them; without it
  towline completions bash > /etc/bash_completion.d/towline
  towline completions zsh > /usr/local/share/zsh/site-functions/_towline
  towline completions fish > /etc/fish/completions/towline.fish";

pub(super) const VERSION: &str = "\
Examples:
  towline version
  # with the version of the JSON documents
  towline version -o json";
