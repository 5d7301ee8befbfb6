//! flannel in the cluster: on each worker, and with VXLAN on the control plane's host too, since the API server and
//! the host reach pods only through the tunnel.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use nix::errno::Errno;
use serde_json::{Value, json};
use towline_netlink::{Overlay, OverlayKind, Rtnetlink};

use super::Form;
use super::plane::{PODS, PODS_V6, Plane};
use super::programs::Programs;
use crate::cluster::{kubeconfig, replace};
use crate::lab::interrupt::wait_for;
use crate::lab::namespace::Namespace;
use crate::lab::process::{Daemon, Program};
use crate::lab::report::Forbidden;
use crate::lab::topology::Host;

/// Link of the mesh, between whose addresses flannel tunnels.
const MESH_LINK: &str = "towline0";
/// Link that the backend `vxlan` creates.
pub(super) const TUNNEL_LINK: &str = "flannel.1";
/// The same for IPv6.
pub(super) const TUNNEL_LINK_V6: &str = "flannel-v6.1";
/// File with which flannel tells its plugin the pod network of a machine.
pub(super) const SUBNET_FILE: &str = "/run/flannel/subnet.env";
/// User of flannel in the cluster.
const USER: &str = "flannel";
/// Limit for the controller manager to give a pod network to a Node.
const POD_NETWORK_LIMIT: Duration = Duration::from_secs(60);

/// Checks that the kernel has VXLAN links.
///
/// # Errors
/// Returns [`Forbidden`] if it has none.
pub(super) fn require_vxlan() -> anyhow::Result<()> {
    let created = Namespace::new("vxlan")?.run(|| {
        let remote = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let overlay = Overlay { kind: OverlayKind::Vxlan, id: 1, remote, port: 8472 };
        Ok(Rtnetlink::open()?.add_overlay(TUNNEL_LINK, overlay))
    })?;
    match created {
        Err(error) if error.errno() == Some(Errno::EOPNOTSUPP) => Err(anyhow!(Forbidden {
            what: "this kernel has no VXLAN links".to_owned(),
            remedy: "load the module with `modprobe vxlan`".to_owned(),
        })),
        other => other.map_err(Into::into),
    }
}

/// Gives flannel its rights, and with VXLAN starts it on the host of the first API server. Returns its process there.
pub(super) fn prepare(
    plane: &Plane,
    host: &Host,
    directory: &Path,
    programs: &Programs,
    form: Form,
) -> anyhow::Result<Option<Daemon>> {
    if form.cni.backend().is_none() {
        return Ok(None);
    }
    let api = "rbac.authorization.k8s.io";
    let mut items = vec![
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": USER},
            "rules": [
                rule("nodes", &["get", "list", "watch"]), rule("nodes/status", &["patch"]),
            ],
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": USER},
            "roleRef": {"apiGroup": api, "kind": "ClusterRole", "name": USER},
            "subjects": [{"apiGroup": api, "kind": "User", "name": USER}],
        }),
    ];
    if !form.cni.tunnels() {
        // The mesh routes what the host of the API server sends to pods.
        plane.apply(programs, &json!({"apiVersion": "v1", "kind": "List", "items": items}))?;
        return Ok(None);
    }
    // No kubelet runs on this host: its Node only gives flannel a pod network.
    items.push(json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "cp"},
        "spec": {"unschedulable": true},
    }));
    plane.apply(programs, &json!({"apiVersion": "v1", "kind": "List", "items": items}))?;
    wait_for("pod network for the Node cp", POD_NETWORK_LIMIT, || {
        let path = "jsonpath={.spec.podCIDR}";
        let found = plane.kubectl(programs, &["get", "node", "cp", "-o", path])?;
        Ok((!found.is_empty()).then_some(()))
    })?;
    let directory = directory.join("cp-flannel");
    std::fs::create_dir(&directory)?;
    let subnet_file = directory.join("subnet.env");
    let server = "https://127.0.0.1:6443";
    let run = Run { name: "cp", server, directory: &directory, subnet_file: &subnet_file };
    let flannel = programs.flannel.as_ref().context("flannel was not built")?;
    start(run, Program::new(&flannel.daemon), plane, host, form).map(Some)
}

/// Returns a rule of a ClusterRole.
fn rule(resource: &str, verbs: &[&str]) -> Value {
    json!({"apiGroups": [""], "resources": [resource], "verbs": verbs})
}

/// Place and names of a process of flannel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run<'a> {
    /// Name of the Node.
    pub(super) name: &'a str,
    /// URL of the API server.
    pub(super) server: &'a str,
    /// Directory for its files.
    pub(super) directory: &'a Path,
    /// File for the plugin.
    pub(super) subnet_file: &'a Path,
}

/// Starts flannel, which is `program`, on a machine whose Node has a pod network.
pub(super) fn start(
    run: Run<'_>,
    program: Program,
    plane: &Plane,
    host: &Host,
    form: Form,
) -> anyhow::Result<Daemon> {
    let file = |name: &str| run.directory.join(name);
    let certificate = file("flannel.pem");
    replace(&certificate, &plane.ca.issue(USER, "", &[])?.both())?;
    replace(&file("flannel.conf"), &kubeconfig(run.server, &plane.ca_file(), &certificate))?;
    replace(&file("net-conf.json"), &configuration(form).to_string())?;
    let flags = [
        ("iface", MESH_LINK.to_owned()),
        ("kubeconfig-file", file("flannel.conf").display().to_string()),
        ("net-config-path", file("net-conf.json").display().to_string()),
        ("subnet-file", run.subnet_file.display().to_string()),
    ];
    program
        .args(flags.map(|(flag, value)| format!("--{flag}={value}")))
        .env("NODE_NAME", run.name)
        .start(host.namespace(), "flannel", &file("flannel.log"))
}

/// Returns the network configuration of the cluster, as a ConfigMap of flannel has it.
fn configuration(form: Form) -> Value {
    let mut configuration = json!({"Network": PODS, "Backend": {"Type": form.cni.backend()}});
    if form.is_dual_stack {
        configuration["EnableIPv6"] = true.into();
        configuration["IPv6Network"] = PODS_V6.into();
    }
    configuration
}
