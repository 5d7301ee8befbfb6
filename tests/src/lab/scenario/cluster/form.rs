//! The checks of one form of the cluster, in the order in which an operator meets them.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use data_encoding::BASE64;
use ipnet::IpNet;
use serde_json::{Value, json};
use towline_netlink::{Family, MAIN_TABLE, Rtnetlink};

use super::daemon_set::{self, Stage};
use super::flannel::{self, TUNNEL_LINK, TUNNEL_LINK_V6};
use super::machine::{API_ENDPOINT, Layout, Machine, agent_section, pod};
use super::plane::{PODS, PODS_V6, Plane, SERVICES};
use super::programs::Programs;
use super::{Checks, Cni, Form};
use crate::lab::capture::Capture;
use crate::lab::interrupt::sleep;
use crate::lab::mesh::{Controller, Node, START_LIMIT, require_tunnel};
use crate::lab::namespace::Namespace;
use crate::lab::process::Daemon;
use crate::lab::scenario::Setting;
use crate::lab::scenario::hybrid::{Hybrid, NODES};
use crate::lab::traffic::Pattern;

/// Limit for a change that takes Kubernetes a few seconds.
const LIMIT: Duration = Duration::from_secs(60);
/// Time for which a site loses its line.
const LINE_LOSS: Duration = Duration::from_secs(60);
/// Service with a pod on worker-b.
const ECHO: &str = "10.96.0.20";
/// The same in IPv6.
const ECHO_V6: &str = "fd00:10:96::20";
/// Service of DNS, with a pod on worker-b.
const DNS: &str = "10.96.0.10";
/// Port of every worker that leads to a pod of the same worker.
const NODE_PORT: u16 = 30_080;

/// Further control-plane nodes, with their addresses on the internet.
const MORE_PLANES: [(&str, &str, &str); 2] =
    [("cp-2", "203.0.113.22", "2001:db8::22"), ("cp-3", "203.0.113.23", "2001:db8::23")];

/// A cluster that runs.
struct Scene<'a> {
    programs: &'a Programs,
    plane: Plane,
    machines: [Machine; 2],
    cp: Node,
    /// Control-plane nodes whose API servers are started last.
    planes: Vec<Node>,
    /// flannel on the host of the control plane, if pods are reached through its tunnel.
    _flannel: Option<Daemon>,
    hybrid: &'a Hybrid,
    form: Form,
}

/// Builds the cluster and runs all checks.
pub(super) fn play(
    setting: &Setting,
    programs: &Programs,
    images: &[PathBuf],
    form: Form,
    checks: &mut Checks<'_>,
) -> anyhow::Result<()> {
    let mut hybrid = Hybrid::build(setting)?;
    let mut more_planes = Vec::new();
    for (name, v4, v6) in MORE_PLANES {
        more_planes.push(hybrid.lab.host(name).public(v4, v6)?.build()?);
    }
    let pod_worker = if form.has_daemon_set {
        let (name, v4, v6) = daemon_set::WORKER;
        Some(hybrid.lab.host(name).public(v4, v6)?.build()?)
    } else {
        None
    };
    let captures = hybrid.capture_uplinks(Pattern::random()?)?;
    for capture in &captures {
        capture.watch([PODS.parse()?, SERVICES.parse()?]);
    }
    setting.output.step("starting the mesh");
    let directory = hybrid.lab.directory();
    let controller = Controller::start(&hybrid.lab, &hybrid.cp, &setting.binaries)?;
    let mut nodes = Vec::new();
    for (name, site, configuration) in NODES {
        let is_control_plane = name == "cp";
        let kubernetes = if is_control_plane {
            control_plane_section(directory)
        } else {
            agent_section(directory, name)
        };
        let more = format!("{configuration}\n{kubernetes}");
        let mut node = Node::new(&hybrid.lab, hybrid.host(name)?, name, &setting.binaries, &more)?;
        let mut flags = vec!["--site", site, "--prefix", PODS];
        if form.is_dual_stack {
            flags.extend(["--prefix", PODS_V6]);
        }
        if is_control_plane {
            flags.push("--control-plane");
        }
        node.join(&controller.operator().token_with(&flags)?)?;
        node.restart()?;
        nodes.push(node);
    }
    let mut planes = Vec::new();
    for host in &more_planes {
        let (name, kubernetes) = (host.name(), control_plane_section(directory));
        let mut node = Node::new(&hybrid.lab, host, name, &setting.binaries, &kubernetes)?;
        let flags = ["--site", "cloud", "--control-plane"];
        node.join(&controller.operator().token_with(&flags)?)?;
        node.restart()?;
        planes.push(node);
    }
    let cp = nodes.remove(0);
    for worker in &nodes {
        require_tunnel(worker, &cp, START_LIMIT)?;
    }
    setting.output.step("starting the control plane");
    let plane =
        Plane::start(&hybrid.cp, cp.overlay_v4()?, directory, programs, form.is_dual_stack)?;
    setting.output.step("starting containerd on the workers");
    let mut machines = Vec::new();
    for node in nodes {
        machines.push(Machine::start(node, Layout::Lab, directory, programs, images)?);
    }
    let machines: [Machine; 2] =
        machines.try_into().map_err(|_| anyhow::anyhow!("there are not two workers"))?;
    let flannel = flannel::prepare(&plane, &hybrid.cp, directory, programs, form)?;
    let mut scene =
        Scene { programs, plane, machines, cp, planes, _flannel: flannel, hybrid: &hybrid, form };

    setting.output.step("joining the workers to the cluster");
    for index in 0..scene.machines.len() {
        scene.join(index, checks)?;
    }
    if form.cni == Cni::HostGw {
        scene.host_routes(checks)?;
    }
    setting.output.step("starting pods");
    scene.start_pods(checks)?;
    if form.cni == Cni::HostGw {
        for index in 0..scene.machines.len() {
            scene.announces(index, checks)?;
        }
    }
    setting.output.step("using pods from the control plane");
    scene.commands(checks)?;
    if checks.screen.is_empty() {
        *checks.screen = scene.screen()?;
    }
    setting.output.step("sending between pods, Services and hosts");
    scene.traffic(checks)?;
    scene.webhook(checks)?;
    setting.output.step("restarting the control plane");
    scene.restart_control_plane(checks)?;
    setting.output.step("taking the line of a site for 60 s");
    scene.lose_line(checks)?;
    setting.output.step("draining a worker, and joining it again");
    scene.rejoin(checks)?;
    if let Some(host) = pod_worker {
        setting.output.step("running the agent of a worker in a pod");
        let node = Node::new(&hybrid.lab, &host, host.name(), &setting.binaries, "")?;
        let pod = SocketAddr::new(scene.pod_address("echo-b")?, 8080);
        let connection = daemon_set::connect(scene.machines[0].host().namespace(), pod)?;
        let stage = Stage {
            programs,
            plane: &mut scene.plane,
            operator: controller.operator(),
            node,
            images,
            directory,
            connection,
            form,
        };
        daemon_set::play(stage, checks)?;
    }
    setting.output.step("killing one of three API servers after the other");
    scene.kill_api_servers(checks)?;
    clear(captures, checks)
}

impl Scene<'_> {
    /// Joins a worker with the bootstrap token, gives it its CNI configuration, and checks that it becomes ready.
    fn join(&mut self, index: usize, checks: &mut Checks<'_>) -> anyhow::Result<()> {
        let Self { plane, machines, programs, .. } = self;
        machines[index].join(plane, programs)?;
        let name = machines[index].node.name().to_owned();
        let mut pods: Vec<String> = Vec::new();
        let label = format!("{name} registers with a bootstrap token, through its API endpoint");
        let registered = checks.check(&label, LIMIT, || {
            machines[index].check()?;
            let path = "jsonpath={.spec.podCIDRs}";
            let found = self.plane.kubectl(self.programs, &["get", "node", &name, "-o", path])?;
            pods = serde_json::from_str(&found).context("it has no pod networks yet")?;
            Ok(pods.len() == if self.form.is_dual_stack { 2 } else { 1 })
        })?;
        ensure!(registered, "{name} did not register");
        let (plane, programs, form) = (&self.plane, self.programs, self.form);
        self.machines[index].start_proxy(plane, programs, form.proxy.name())?;
        if form.cni.backend().is_some() {
            self.machines[index].start_flannel(plane, programs, form)?;
        }
        self.machines[index].write_cni(&pods)?;
        let ready = checks.check(&format!("{name} is ready"), LIMIT, || {
            let path = "jsonpath={.status.conditions[?(@.type==\"Ready\")].status}";
            Ok(self.kubectl(&["get", "node", &name, "-o", path])? == "True")
        })?;
        ensure!(ready, "{name} is not ready");
        if self.form.cni != Cni::HostGw {
            self.announces(index, checks)?;
        }
        let status = self.machines[index].node.command_ok(&["status", "-o", "json"])?;
        let status: Value = serde_json::from_str(&status)?;
        checks.check(&format!("the API endpoint of {name} leads to cp"), Duration::ZERO, || {
            let endpoint = &status["api_endpoint"];
            Ok(endpoint["server"] == "cp" && endpoint["connections"].as_u64() > Some(0))
        })?;
        Ok(())
    }

    /// Checks that the agent of a worker announces its pod networks, or that it leaves them to the CNI's tunnel. An
    /// agent outside of the machine sees that flannel routes natively once a pod is connected.
    fn announces(&self, index: usize, checks: &mut Checks<'_>) -> anyhow::Result<()> {
        let node = &self.machines[index].node;
        let name = node.name();
        let path = "jsonpath={.spec.podCIDRs}";
        let pods = self.kubectl(&["get", "node", name, "-o", path])?;
        let pods: Vec<String> = serde_json::from_str(&pods).context("it has no pod networks")?;
        if !self.form.cni.tunnels() {
            let label = format!("cp knows the pod network of {name}");
            checks.check(&label, LIMIT, || self.cp_knows(name, &pods))?;
            return Ok(());
        }
        let label = format!("{name} announces no pods that flannel tunnels");
        checks.check(&label, LIMIT, || {
            let status: Value = serde_json::from_str(&node.command_ok(&["status", "-o", "json"])?)?;
            let kubernetes = &status["kubernetes"];
            let cni = kubernetes["cni"].as_str().unwrap_or_default();
            let none = kubernetes["pod_networks"].as_array().is_none_or(Vec::is_empty);
            let tunnels = cni.starts_with("flannel (vxlan flannel.1)");
            Ok(tunnels && none && !self.cp_knows(name, &pods)?)
        })?;
        Ok(())
    }

    /// Checks that flannel's routes to pods of the other worker lead to the mesh.
    fn host_routes(&self, checks: &mut Checks<'_>) -> anyhow::Result<()> {
        let [worker_a, worker_b] = &self.machines;
        for (from, to) in [(worker_a, worker_b), (worker_b, worker_a)] {
            let (name, gateway) = (to.node.name(), to.node.overlay_v4()?);
            let label = format!("{} has flannel's route to pods of {name}", from.node.name());
            checks.check(&label, LIMIT, || {
                let path = "jsonpath={.spec.podCIDR}";
                let pods = self.kubectl(&["get", "node", name, "-o", path])?.parse::<IpNet>()?;
                from.host().namespace().run(|| {
                    let mut netlink = Rtnetlink::open()?;
                    let link = Some(netlink.link_index("towline0")?);
                    let routes = netlink.routes(Family::V4, Some(MAIN_TABLE))?;
                    Ok(routes.iter().any(|route| {
                        route.destination == pods
                            && route.gateway == Some(gateway)
                            && route.link == link
                    }))
                })
            })?;
        }
        Ok(())
    }

    /// Returns whether the agent of the control plane has these pod networks of a worker in its map.
    fn cp_knows(&self, name: &str, pods: &[String]) -> anyhow::Result<bool> {
        let peers: Value = serde_json::from_str(&self.cp.command_ok(&["peers", "-o", "json"])?)?;
        let peer = peers.as_array().into_iter().flatten().find(|peer| peer["name"] == *name);
        let prefixes = peer.and_then(|peer| peer["prefixes"].as_array());
        let has = |list: &Vec<Value>| pods.iter().all(|pod| list.iter().any(|net| *net == **pod));
        Ok(prefixes.is_some_and(has))
    }

    /// Creates the pods and Services, and checks that the pods run.
    fn start_pods(&self, checks: &mut Checks<'_>) -> anyhow::Result<()> {
        checks.check("pods and Services are created", LIMIT, || {
            let service = |name: &str, app: &str, spec: Value| {
                let mut spec = spec;
                spec["selector"] = json!({"app": app});
                json!({
                    "apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec,
                })
            };
            let mut items = vec![
                pod("echo-a", "worker-a", &["serve", "echo-a"]),
                pod("echo-b", "worker-b", &["serve", "echo-b"]),
                service(
                    "echo",
                    "echo-b",
                    json!({
                        "clusterIP": ECHO, "ports": [{"port": 80, "targetPort": 8080}],
                    }),
                ),
                service(
                    "dns",
                    "echo-b",
                    json!({
                        "clusterIP": DNS,
                        "ports": [{"port": 53, "targetPort": 5353, "protocol": "UDP"}],
                    }),
                ),
                service(
                    "player",
                    "echo-a",
                    json!({
                        "type": "NodePort",
                        "externalTrafficPolicy": "Local",
                        "ports": [{"port": 80, "targetPort": 8080, "nodePort": NODE_PORT}],
                    }),
                ),
            ];
            if self.form.is_dual_stack {
                let ports = json!([{"port": 80, "targetPort": 8080}]);
                let spec = json!({"clusterIP": ECHO_V6, "ipFamilies": ["IPv6"], "ports": ports});
                items.push(service("echo-v6", "echo-b", spec));
            }
            let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
            self.plane.apply(self.programs, &list).map(|()| true)
        })?;
        for name in ["echo-a", "echo-b"] {
            self.runs(name, checks)?;
        }
        Ok(())
    }

    /// Checks that a pod runs.
    fn runs(&self, name: &str, checks: &mut Checks<'_>) -> anyhow::Result<()> {
        let runs = checks.check(&format!("{name} runs"), 2 * LIMIT, || {
            let phase = self.kubectl(&["get", "pod", name, "-o", "jsonpath={.status.phase}"])?;
            Ok(phase == "Running")
        })?;
        ensure!(runs, "{name} does not run");
        Ok(())
    }

    /// Checks the commands of kubectl for which the API server calls a kubelet behind NAT.
    fn commands(&self, checks: &mut Checks<'_>) -> anyhow::Result<()> {
        for name in ["echo-a", "echo-b"] {
            checks.check(&format!("kubectl logs {name}"), LIMIT, || {
                Ok(self.kubectl(&["logs", name])? == format!("hello from {name}\n"))
            })?;
            checks.check(&format!("kubectl exec {name}"), LIMIT, || {
                let comm = self.exec(name, &["cat", "/proc/1/comm"])?;
                Ok(comm == "testpod\n")
            })?;
            let source = self.hybrid.lab.directory().join(format!("to-{name}"));
            std::fs::write(&source, format!("for {name}"))?;
            checks.check(&format!("kubectl cp to {name}"), LIMIT, || {
                let (from, to) = (source.display().to_string(), format!("{name}:/tmp/file"));
                self.kubectl(&["cp", &from, &to])?;
                // The test program extracts under the name of the source.
                let copied = self.exec(name, &["cat", "/tmp/file"]);
                let copied =
                    copied.or_else(|_| self.exec(name, &["cat", &format!("/tmp/to-{name}")]))?;
                Ok(copied == format!("for {name}"))
            })?;
            let forward = format!("pod/{name}");
            let _forward = self
                .plane
                .start_kubectl(self.programs, &["port-forward", &forward, "18080:8080"])?;
            let local = SocketAddr::new([127, 0, 0, 1].into(), 18_080);
            checks.check(&format!("kubectl port-forward {name}"), LIMIT, || {
                Ok(http(self.hybrid.cp.namespace(), local)?.contains(name))
            })?;
        }
        Ok(())
    }

    /// Returns what an operator of the control plane types to reach a pod of a worker behind NAT, and the output.
    fn screen(&self) -> anyhow::Result<String> {
        let mut screen = String::new();
        for words in [
            &["get", "nodes", "-o", "wide"][..],
            &["get", "pods", "-o", "wide"],
            &["exec", "echo-a", "--", "testpod", "cat", "/etc/hostname"],
        ] {
            let _ = write!(screen, "$ kubectl {}\n{}", words.join(" "), self.kubectl(words)?);
        }
        let _ = write!(screen, "$ towline peers\n{}", self.cp.peers_table()?);
        Ok(screen)
    }

    /// Checks the connections between pods, Services and hosts.
    fn traffic(&self, checks: &mut Checks<'_>) -> anyhow::Result<()> {
        let (a, b) = (self.pod_address("echo-a")?, self.pod_address("echo-b")?);
        for (from, to, address) in [("echo-a", "echo-b", b), ("echo-b", "echo-a", a)] {
            checks.check(&format!("pod {from} to pod {to} across sites"), LIMIT, || {
                let url = format!("http://{address}:8080/");
                Ok(self.exec(from, &["get", &url, "text"])? == format!("{to}\ntext"))
            })?;
        }
        if self.form.is_dual_stack {
            let path = "jsonpath={.status.podIPs[1].ip}";
            let v6 = self.kubectl(&["get", "pod", "echo-b", "-o", path])?;
            for (what, host) in [("pod echo-b", v6.as_str()), ("a Service", ECHO_V6)] {
                checks.check(&format!("pod echo-a to {what} across sites, IPv6"), LIMIT, || {
                    let url = match what {
                        "a Service" => format!("http://[{host}]/"),
                        _ => format!("http://[{host}]:8080/"),
                    };
                    Ok(self.exec("echo-a", &["get", &url, "text"])? == "echo-b\ntext")
                })?;
            }
        }
        for (from, how) in [("echo-a", "across sites"), ("echo-b", "on its node")] {
            checks.check(&format!("pod {from} to a Service {how}"), LIMIT, || {
                let url = format!("http://{ECHO}/");
                Ok(self.exec(from, &["get", &url, "text"])? == "echo-b\ntext")
            })?;
            checks.check(
                &format!("pod {from} resolves a name through a Service {how}"),
                LIMIT,
                || {
                    let server = format!("{DNS}:53");
                    Ok(self.exec(from, &["resolve", &server, "a.example."])? == "192.0.2.1\n")
                },
            )?;
        }
        let [worker_a, worker_b] = &self.machines;
        let service = SocketAddr::new(ECHO.parse()?, 80);
        for (machine, how) in [(worker_a, "across sites"), (worker_b, "on its node")] {
            let name = machine.node.name();
            checks.check(&format!("host {name} to a Service {how}"), LIMIT, || {
                Ok(http(machine.host().namespace(), service)?.contains("echo-b"))
            })?;
        }
        for (name, address) in [("echo-a", a), ("echo-b", b)] {
            checks.check(&format!("host cp to pod {name}"), LIMIT, || {
                let pod = SocketAddr::new(address, 8080);
                Ok(http(self.hybrid.cp.namespace(), pod)?.contains(name))
            })?;
        }
        let outside = worker_a.host().addresses().iter().find(|address| address.is_ipv4());
        let player = SocketAddr::new(*outside.context("worker-a has no IPv4 address")?, NODE_PORT);
        checks.check("a player outside of the mesh reaches a NodePort", LIMIT, || {
            Ok(http(self.hybrid.routers[0].host().namespace(), player)?.contains("echo-a"))
        })?;
        Ok(())
    }

    /// Checks that the API server calls a webhook in a pod.
    fn webhook(&self, checks: &mut Checks<'_>) -> anyhow::Result<()> {
        let network = self.pod_address("echo-b")?.to_string();
        let (network, _) = network.rsplit_once('.').context("pods have IPv4 addresses")?;
        // The pod gets one of the next addresses of its worker.
        let names: Vec<String> = (2..60).map(|number| format!("{network}.{number}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let pair = self.plane.ca.issue("webhook", "", &names)?;
        let certificate = BASE64.encode(pair.certificate.as_bytes());
        let key = BASE64.encode(pair.key.as_bytes());
        let hook = pod("hook", "worker-b", &["webhook", &certificate, &key]);
        self.plane.apply(self.programs, &hook)?;
        self.runs("hook", checks)?;
        let address = self.pod_address("hook")?;
        self.plane.apply(self.programs, &json!({
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "MutatingWebhookConfiguration",
            "metadata": {"name": "lab"},
            "webhooks": [{
                "name": "lab.example.com",
                "admissionReviewVersions": ["v1"],
                "sideEffects": "None",
                "timeoutSeconds": 5,
                "failurePolicy": "Fail",
                "rules": [{
                    "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"],
                    "resources": ["configmaps"],
                }],
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "default"}},
                "clientConfig": {
                    "url": format!("https://{address}:8443/"),
                    "caBundle": BASE64.encode(self.plane.ca.pem().as_bytes()),
                },
            }],
        }))?;
        let mut number = 0;
        checks.check("the API server calls a webhook in a pod", LIMIT, || {
            number += 1;
            let name = format!("hooked-{number}");
            self.kubectl(&["create", "configmap", &name])?;
            let path = "jsonpath={.metadata.annotations.webhook}";
            Ok(self.kubectl(&["get", "configmap", &name, "-o", path])? == "called")
        })?;
        self.kubectl(&["delete", "mutatingwebhookconfiguration", "lab"])?;
        Ok(())
    }

    /// Restarts the control plane: pods go on meanwhile, and kubelets find it again.
    fn restart_control_plane(&mut self, checks: &mut Checks<'_>) -> anyhow::Result<()> {
        let (a, namespace) = (self.pod_address("echo-a")?, self.hybrid.cp.namespace());
        self.plane.launch(self.programs)?;
        checks.check("pods are reached while the API server starts", LIMIT, || {
            Ok(http(namespace, SocketAddr::new(a, 8080))?.contains("echo-a"))
        })?;
        self.plane.await_ready(self.programs)?;
        for name in ["worker-a", "worker-b"] {
            checks.check(&format!("{name} renews its lease after the restart"), LIMIT, || {
                let lease = ["get", "lease", name, "-n", "kube-node-lease", "-o"];
                let path = "jsonpath={.spec.renewTime}";
                let before = self.kubectl(&[&lease[..], &[path]].concat())?;
                sleep(Duration::from_secs(11))?;
                Ok(self.kubectl(&[&lease[..], &[path]].concat())? != before)
            })?;
        }
        checks.check("kubectl logs after the restart", LIMIT, || {
            Ok(self.kubectl(&["logs", "echo-a"])?.contains("echo-a"))
        })?;
        Ok(())
    }

    /// Takes the line of worker-a's site for a minute.
    fn lose_line(&self, checks: &mut Checks<'_>) -> anyhow::Result<()> {
        let line = |is_up: bool| {
            self.hybrid.lab.internet().run(|| {
                let mut netlink = Rtnetlink::open()?;
                let port = netlink.link_index("router-a")?;
                Ok(netlink.set_up(port, is_up)?)
            })
        };
        let b = self.pod_address("echo-b")?;
        line(false)?;
        let lost = sleep(LINE_LOSS);
        line(true)?;
        lost?;
        checks.check("pods of two sites talk after 60 s without a line", LIMIT, || {
            let url = format!("http://{b}:8080/");
            Ok(self.exec("echo-a", &["get", &url, "text"])?.contains("text"))
        })?;
        checks.check("worker-a is ready after 60 s without a line", 2 * LIMIT, || {
            let path = "jsonpath={.status.conditions[?(@.type==\"Ready\")].status}";
            Ok(self.kubectl(&["get", "node", "worker-a", "-o", path])? == "True")
        })?;
        let (started, wanted) = ("jsonpath={.status.containerStatuses[0].restartCount}", "0");
        checks.check("its pod was not restarted", LIMIT, || {
            Ok(self.kubectl(&["get", "pod", "echo-a", "-o", started])? == wanted)
        })?;
        Ok(())
    }

    /// Drains worker-a, deletes its Node, and joins it again.
    fn rejoin(&mut self, checks: &mut Checks<'_>) -> anyhow::Result<()> {
        checks.check("kubectl drain moves pods away", 2 * LIMIT, || {
            let drain = ["drain", "worker-a", "--force", "--ignore-daemonsets", "--grace-period=1"];
            self.kubectl(&[&drain[..], &["--timeout=30s"]].concat())?;
            Ok(!self.kubectl(&["get", "pods", "-o", "name"])?.contains("echo-a"))
        })?;
        checks.check("the Node is deleted", LIMIT, || {
            self.kubectl(&["delete", "node", "worker-a", "--ignore-not-found"]).map(|_| true)
        })?;
        self.machines[0].reset()?;
        // The new Node gets another pod network.
        let tunnels: &[&str] = match self.form {
            Form { cni: Cni::Bridge | Cni::HostGw, .. } => &[],
            Form { cni: Cni::Flannel, is_dual_stack: false, .. } => &[TUNNEL_LINK],
            Form { cni: Cni::Flannel, is_dual_stack: true, .. } => &[TUNNEL_LINK, TUNNEL_LINK_V6],
        };
        self.machines[0].host().namespace().run(|| {
            let mut netlink = Rtnetlink::open()?;
            for link in [&["cni0"][..], tunnels].concat() {
                let link = netlink.link_index(link)?;
                netlink.delete_link(link)?;
            }
            Ok(())
        })?;
        self.join(0, checks)?;
        self.plane.apply(self.programs, &pod("echo-c", "worker-a", &["serve", "echo-c"]))?;
        self.runs("echo-c", checks)?;
        if self.form.cni == Cni::HostGw {
            self.announces(0, checks)?;
        }
        checks.check("kubectl logs of a worker that joined again", LIMIT, || {
            Ok(self.kubectl(&["logs", "echo-c"])? == "hello from echo-c\n")
        })?;
        Ok(())
    }

    /// Kills each of three API servers, and checks what a client of the API endpoint of worker-b notices.
    fn kill_api_servers(&mut self, checks: &mut Checks<'_>) -> anyhow::Result<()> {
        for node in &self.planes {
            self.plane.add(node.name(), node.host(), node.overlay_v4()?, self.programs)?;
        }
        for node in &self.planes {
            self.plane.await_server(node.name(), self.programs)?;
        }
        checks.check("the API endpoint knows three API servers that answer", LIMIT, || {
            let endpoint = self.endpoint()?;
            let servers = endpoint["servers"].as_array().context("no API servers")?;
            let healthy = servers.iter().filter(|server| server["state"] == "healthy");
            Ok(healthy.count() == 3)
        })?;
        for _ in 0..2 {
            // The one that new clients get.
            let endpoint = self.endpoint()?;
            let chosen = endpoint["server"].as_str().context("no API server is chosen")?.to_owned();
            self.plane.kill(&chosen)?;
            let mut tries = 0;
            let label = "a client needs at most one retry after its API server was killed";
            checks.check(label, LIMIT, || {
                tries += 1;
                let server = format!("https://{API_ENDPOINT}");
                let host = self.machines[1].host();
                let raw = ["get", "--raw", "/readyz"];
                let answer = self.plane.kubectl_on(host, self.programs, &server, &raw)?;
                ensure!(tries <= 2, "it took {tries} tries");
                Ok(answer == "ok")
            })?;
            checks.check("the API endpoint leads to another API server", LIMIT, || {
                Ok(self.endpoint()?["server"].as_str().is_some_and(|server| server != chosen))
            })?;
            self.plane.revive(&chosen, self.programs)?;
            self.plane.await_server(&chosen, self.programs)?;
        }
        Ok(())
    }

    /// Returns the section about the API endpoint of worker-b's status.
    fn endpoint(&self) -> anyhow::Result<Value> {
        let status = self.machines[1].node.command_ok(&["status", "-o", "json"])?;
        let mut status: Value = serde_json::from_str(&status)?;
        Ok(status["api_endpoint"].take())
    }

    fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.plane.kubectl(self.programs, arguments)
    }

    /// Runs the test program in a pod, and returns its output.
    fn exec(&self, name: &str, arguments: &[&str]) -> anyhow::Result<String> {
        self.kubectl(&[&["exec", name, "--", "/usr/bin/testpod"][..], arguments].concat())
    }

    fn pod_address(&self, name: &str) -> anyhow::Result<IpAddr> {
        let text = self.kubectl(&["get", "pod", name, "-o", "jsonpath={.status.podIP}"])?;
        text.parse().with_context(|| format!("{name} has no address: {text:?}"))
    }
}

/// Returns the section `[kubernetes]` of the agent of a control-plane node, which has no kubelet.
fn control_plane_section(directory: &Path) -> String {
    let none = directory.join("no-kubeconfig");
    format!("[kubernetes]\nkubeconfig = {none:?}\napi_port = 6443\n")
}

/// Checks that no packet of pods, Services or the overlay was seen in clear on any uplink.
fn clear(captures: [Capture; 3], checks: &mut Checks<'_>) -> anyhow::Result<()> {
    let names = ["the internet", "the LAN of worker-a", "the LAN of worker-b"];
    for (capture, place) in captures.into_iter().zip(names) {
        let seen = capture.stop()?;
        checks.check(
            &format!("no byte of the cluster in clear on {place}"),
            Duration::ZERO,
            || {
                ensure!(seen.missed == 0, "the capture missed {} frames", seen.missed);
                ensure!(seen.wireguard > 0, "the capture saw no tunnel");
                ensure!(seen.in_clear() == 0, "{} frames in clear", seen.in_clear());
                Ok(true)
            },
        )?;
    }
    Ok(())
}

/// Sends a request from a host, and returns the answer.
fn http(from: &Namespace, to: SocketAddr) -> anyhow::Result<String> {
    const TIMEOUT: Duration = Duration::from_secs(5);
    from.run(|| {
        let mut stream = TcpStream::connect_timeout(&to, TIMEOUT)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.take(64 * 1024).read_to_string(&mut answer)?;
        Ok(answer)
    })
}
