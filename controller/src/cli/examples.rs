//! Examples of the commands, for their help, the man pages and `docs/cli.md`. A test parses each of
//! them.

pub(super) const CONTROLLER: &str = "\
Examples:
  # create a mesh and serve it
  towline-controller serve --advertise 203.0.113.10:7443
  # admit a machine
  towline-controller token create --name gpu-1 --site dc > gpu-1.token
  # who is in the mesh?
  towline-controller node list";

pub(super) const SERVE: &str = "\
Examples:
  # nodes reach it at this address
  towline-controller serve --advertise 203.0.113.10:7443
  # no address of the pods' range ever leaves in clear
  towline-controller serve --advertise 203.0.113.10:7443 --protected 10.244.0.0/16
  # with the web page, for a browser on this machine or one that is forwarded here:
  # ssh -L 7480:127.0.0.1:7480 CONTROLLER
  towline-controller serve --advertise 203.0.113.10:7443 --ui 127.0.0.1:7480";

pub(super) const TOKEN_CREATE: &str = "\
Examples:
  # for one machine, within one hour
  towline-controller token create --name gpu-1 --site dc > gpu-1.token
  # for ten workers of a cluster, within a day: each may announce one /24 of its pod network
  towline-controller token create --uses 10 --ttl 24h --site dc --pod-range 10.244.0.0/16
  # for a cluster with IPv4 and IPv6, whose nodes get two blocks of each
  towline-controller token create --pod-range 10.244.0.0/16 --pod-range fd00:10:244::/56 --blocks 2
  # for both gateways of a LAN
  towline-controller token create --uses 2 --prefix 192.168.50.0/24,shared=lan-b
  # for a machine that was installed again
  towline-controller token create --replace gpu-1 > gpu-1.token
  # for a public machine that relays for others
  towline-controller token create --name relay-1 --relay > relay-1.token
  # for the control-plane nodes of a Kubernetes cluster
  towline-controller token create --control-plane --uses 3 --name 'cp-*' > control-plane.token";

pub(super) const TOKEN_LIST: &str = "\
Examples:
  towline-controller token list
  towline-controller token list -o wide";

pub(super) const TOKEN_REVOKE: &str = "\
Examples:
  # the id is in the first column of `token list`
  towline-controller token revoke 6f1d3c5e7a9b0d24";

pub(super) const NODE_LIST: &str = "\
Examples:
  towline-controller node list
  # ids, versions, source addresses and keys too
  towline-controller node list -o wide
  towline-controller node list -o json";

pub(super) const NODE_SHOW: &str = "\
Examples:
  towline-controller node show gpu-1
  towline-controller node show gpu-1 -o yaml";

pub(super) const NODE_SET: &str = "\
Examples:
  # it has [relay] enabled, and others can reach it
  towline-controller node set gateway-1 --relay
  towline-controller node set gateway-1 --no-relay";

pub(super) const NODE_REMOVE: &str = "\
Examples:
  # the machine is gone, or is not trusted any more
  towline-controller node remove gpu-1";

pub(super) const MESH_SHOW: &str = "\
Examples:
  towline-controller mesh show";

pub(super) const MESH_STATUS: &str = "\
Examples:
  towline-controller mesh status
  # with the age of each report, and peers without traffic
  towline-controller mesh status -o wide";

pub(super) const MESH_MATRIX: &str = "\
Examples:
  towline-controller mesh matrix
  # the nodes of one site, in a mesh with many
  towline-controller mesh matrix --site dc
  # one row for each tunnel, with loss, MTU and relay
  towline-controller mesh matrix -o wide
  towline-controller mesh matrix -o json";

pub(super) const MESH_GRAPH: &str = "\
Examples:
  towline-controller mesh graph -o svg > mesh.svg
  # with Graphviz
  towline-controller mesh graph -o dot | dot -Tpng > mesh.png";

pub(super) const MESH_EVENTS: &str = "\
Examples:
  towline-controller mesh events
  towline-controller mesh events --since 1h -o wide
  # as they happen, one JSON object on each line
  towline-controller mesh events --follow -o json";

pub(super) const MESH_SET: &str = "\
Examples:
  # before the controller moves, while agents are connected
  towline-controller mesh set --controllers 203.0.113.10:7443,203.0.113.11:7443
  towline-controller mesh set --protected 10.244.0.0/16
  # an empty list
  towline-controller mesh set --trusted-site none";

pub(super) const ADMIN_LIST: &str = "\
Examples:
  towline-controller admin list
  towline-controller admin list -o json";

pub(super) const ADMIN_CREATE: &str = "\
Examples:
  towline-controller admin create anna --directory anna-mesh
  # on her machine, with a copy of the directory, where the controller has `remote_admin = true`
  towline-controller --state-dir anna-mesh --controller 203.0.113.10:7443 node list
  # within 7 days, for another 7
  towline-controller --state-dir anna-mesh --controller 203.0.113.10:7443 admin create anna --directory anna-mesh";

pub(super) const ADMIN_REVOKE: &str = "\
Examples:
  # the key is in the second column of `admin list`
  towline-controller admin revoke 8d1f0c6a52b7e94d3a61f80b7c2e5d4910a3b6c8d7e2f1049b8a7c6d5e4f3a21
  # the credential in the state directory may have been copied
  towline-controller admin revoke local";

pub(super) const BACKUP: &str = "\
Examples:
  towline-controller backup /root/mesh.redb";

#[cfg(feature = "kubernetes")]
pub(super) const PUBLISH: &str = "\
Examples:
  # after `kubectl apply -f deploy/kubernetes/crds.yaml`; then `kubectl get towlinenodes,towlinepaths`
  towline-controller publish --kubeconfig /root/publisher.conf
  # in a pod, with the rights of its service account
  towline-controller publish";

pub(super) const STORE_EXPORT: &str = "\
Examples:
  # the controller is stopped; while it runs, use `towline-controller backup`
  towline-controller store export /root/mesh.redb
  # a store in etcd, which may be in use
  towline-controller store export --store etcd://127.0.0.1:2379 /root/mesh.redb";

pub(super) const STORE_IMPORT: &str = "\
Examples:
  # the controller is stopped, and `store` of the configuration names an empty etcd
  towline-controller store import /root/mesh.redb
  # back into a file, after towline.redb was moved away
  towline-controller store import --store file /root/mesh.redb";

pub(super) const CONFIG_CHECK: &str = "\
Examples:
  towline-controller config check
  # a file that is not installed yet
  towline-controller --config new.toml config check";

pub(super) const COMPLETIONS: &str = "\
Examples:
  # the package installs them; without it
  towline-controller completions bash > /etc/bash_completion.d/towline-controller
  towline-controller completions zsh > /usr/local/share/zsh/site-functions/_towline-controller
  towline-controller completions fish > /etc/fish/completions/towline-controller.fish";

pub(super) const VERSION: &str = "\
Examples:
  towline-controller version
  # with the version of the JSON documents
  towline-controller version -o json";
