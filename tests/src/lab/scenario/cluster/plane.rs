//! Control plane of the cluster: etcd, API server, controller manager and scheduler on one host.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use data_encoding::BASE64;
use serde_json::{Value, json};

use super::programs::Programs;
use crate::cluster::{ClusterCa, kubeconfig, replace};
use crate::lab::interrupt::wait_for;
use crate::lab::process::{Daemon, Program};
use crate::lab::topology::Host;

/// Limit for the API server to start on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(120);
/// Limit for a command of kubectl.
const COMMAND_LIMIT: Duration = Duration::from_secs(40);
/// Token with which kubelets get their certificate, in kubeadm's form: an id and a secret.
const BOOTSTRAP_TOKEN: [&str; 2] = ["abcdef", "0123456789abcdef"];
/// Network of the pods.
pub(super) const PODS: &str = "10.244.0.0/16";
/// IPv6 network of the pods in a dual-stack cluster.
pub(super) const PODS_V6: &str = "fd00:10:244::/56";
/// Network of the Services.
pub(super) const SERVICES: &str = "10.96.0.0/16";
/// IPv6 network of the Services in a dual-stack cluster.
const SERVICES_V6: &str = "fd00:10:96::/112";

/// Running control plane.
pub(super) struct Plane {
    directory: PathBuf,
    is_dual_stack: bool,
    pub(super) ca: ClusterCa,
    /// Lifetime of the certificates that the controller manager signs.
    lifetime: &'static str,
    _etcd: Daemon,
    /// The API servers. The first one is on the host of etcd, and kubectl uses it.
    servers: Vec<ApiServer>,
    others: Vec<Daemon>,
}

/// An API server.
struct ApiServer {
    /// Name of its node.
    name: String,
    host: Arc<Host>,
    /// Address of the node in the mesh.
    address: IpAddr,
    /// `None` while it does not run.
    daemon: Option<Daemon>,
}

impl Plane {
    /// Starts the programs on `host`, and waits until the API server serves. Nodes reach it by `address`, or by
    /// their own endpoint on 127.0.0.1.
    pub(super) fn start(
        host: &Arc<Host>,
        address: IpAddr,
        directory: &Path,
        programs: &Programs,
        is_dual_stack: bool,
    ) -> anyhow::Result<Self> {
        let directory = directory.join("plane");
        std::fs::create_dir(&directory)?;
        let ca = ClusterCa::new("kubernetes")?;
        replace(&directory.join("ca.crt"), ca.pem())?;
        replace(&directory.join("ca.key"), &ca.key_pem())?;
        ca.issue("service-accounts", "", &[])?.write(&directory, "sa")?;
        ca.issue("kube-apiserver-kubelet-client", "system:masters", &[])?
            .write(&directory, "kubelet-client")?;
        for (name, user, group) in [
            ("admin", "admin", "system:masters"),
            ("controller-manager", "system:kube-controller-manager", ""),
            ("scheduler", "system:kube-scheduler", ""),
        ] {
            let certificate = directory.join(format!("{name}.pem"));
            replace(&certificate, &ca.issue(user, group, &[])?.both())?;
            let text =
                kubeconfig("https://127.0.0.1:6443", &directory.join("ca.crt"), &certificate);
            replace(&directory.join(format!("{name}.conf")), &text)?;
        }
        let etcd = Program::new(&programs.etcd)
            .arg("--data-dir")
            .arg(directory.join("etcd"))
            .arg("--listen-client-urls")
            .arg(format!("http://127.0.0.1:2379,http://{address}:2379"))
            .args(["--advertise-client-urls", "http://127.0.0.1:2379"])
            .args(["--listen-peer-urls", "http://127.0.0.1:2380"])
            .start(host.namespace(), "etcd", &directory.join("etcd.log"))?;
        let mut plane = Self {
            directory,
            is_dual_stack,
            ca,
            lifetime: "24h",
            _etcd: etcd,
            servers: Vec::new(),
            others: Vec::new(),
        };
        plane.add("cp", host, address, programs)?;
        plane.await_ready(programs)?;
        plane.bootstrap(programs)?;
        Ok(plane)
    }

    /// Adds an API server on the host of the node `name`, and starts it.
    pub(super) fn add(
        &mut self,
        name: &str,
        host: &Arc<Host>,
        address: IpAddr,
        programs: &Programs,
    ) -> anyhow::Result<()> {
        let own: Vec<String> =
            host.addresses().iter().chain([&address]).map(ToString::to_string).collect();
        let mut names = vec!["10.96.0.1", "127.0.0.1", "kubernetes.default.svc"];
        names.extend(own.iter().map(String::as_str));
        let pair = self.ca.issue("kube-apiserver", "", &names)?;
        pair.write(&self.directory, &format!("apiserver-{name}"))?;
        let (name, host) = (name.to_owned(), Arc::clone(host));
        self.servers.push(ApiServer { name: name.clone(), host, address, daemon: None });
        self.revive(&name, programs)
    }

    /// Kills all programs on the host of etcd but etcd itself, and starts its API server again.
    pub(super) fn launch(&mut self, programs: &Programs) -> anyhow::Result<()> {
        self.others.clear();
        self.kill("cp")?;
        self.revive("cp", programs)
    }

    /// Kills the API server of a node.
    pub(super) fn kill(&mut self, name: &str) -> anyhow::Result<()> {
        self.server(name)?.daemon = None;
        Ok(())
    }

    /// Starts the API server of a node again. Does not wait until it serves.
    pub(super) fn revive(&mut self, name: &str, programs: &Programs) -> anyhow::Result<()> {
        let etcd = match self.servers.first() {
            Some(first) if first.name != name => first.address.to_string(),
            _ => "127.0.0.1".to_owned(),
        };
        let (directory, services) = (self.directory.clone(), self.services());
        let server = self.server(name)?;
        let file = |name: &str| directory.join(name).display().to_string();
        let apiserver = [
            ("etcd-servers", format!("http://{etcd}:2379")),
            ("secure-port", "6443".to_owned()),
            ("advertise-address", server.address.to_string()),
            ("authorization-mode", "Node,RBAC".to_owned()),
            ("enable-admission-plugins", "NodeRestriction".to_owned()),
            ("enable-bootstrap-token-auth", "true".to_owned()),
            ("client-ca-file", file("ca.crt")),
            ("tls-cert-file", file(&format!("apiserver-{name}.crt"))),
            ("tls-private-key-file", file(&format!("apiserver-{name}.key"))),
            ("service-account-key-file", file("sa.crt")),
            ("service-account-signing-key-file", file("sa.key")),
            ("service-account-issuer", "https://kubernetes.default.svc".to_owned()),
            ("service-cluster-ip-range", services),
            ("kubelet-certificate-authority", file("ca.crt")),
            ("kubelet-client-certificate", file("kubelet-client.crt")),
            ("kubelet-client-key", file("kubelet-client.key")),
            ("kubelet-preferred-address-types", "InternalIP".to_owned()),
            ("cert-dir", file(&format!("certs-{name}"))),
        ];
        let log = directory.join(format!("kube-apiserver-{name}.log"));
        server.daemon = Some(daemon(&server.host, &programs.apiserver, &apiserver, &log)?);
        Ok(())
    }

    /// Waits until the API server of a node serves.
    pub(super) fn await_server(&mut self, name: &str, programs: &Programs) -> anyhow::Result<()> {
        let address = format!("https://{}:6443", self.server(name)?.address);
        wait_for(&format!("answer from the API server of {name}"), START_LIMIT, || {
            if let Some(daemon) = &mut self.server(name)?.daemon {
                daemon.check()?;
            }
            Ok(self.kubectl(programs, &["--server", &address, "get", "--raw", "/readyz"]).ok())
        })
        .map(drop)
    }

    fn server(&mut self, name: &str) -> anyhow::Result<&mut ApiServer> {
        let found = self.servers.iter_mut().find(|server| server.name == name);
        found.with_context(|| format!("{name} has no API server"))
    }

    /// Starts the controller manager and the scheduler, which end where no API server answers.
    fn launch_others(&mut self, programs: &Programs) -> anyhow::Result<()> {
        let file = |name: &str| self.directory.join(name).display().to_string();
        let mut controller_manager = vec![
            ("kubeconfig", file("controller-manager.conf")),
            ("leader-elect", "false".to_owned()),
            ("controllers", "*,bootstrapsigner,tokencleaner".to_owned()),
            ("use-service-account-credentials", "true".to_owned()),
            ("service-account-private-key-file", file("sa.key")),
            ("root-ca-file", file("ca.crt")),
            ("cluster-signing-cert-file", file("ca.crt")),
            ("cluster-signing-key-file", file("ca.key")),
            ("cluster-signing-duration", self.lifetime.to_owned()),
            ("allocate-node-cidrs", "true".to_owned()),
            ("cluster-cidr", self.pods()),
            ("service-cluster-ip-range", self.services()),
            ("node-monitor-grace-period", "40s".to_owned()),
            ("cert-dir", file("controller-manager-certs")),
        ];
        // The defaults are 24 and 64 bits; each flag is refused where it does not fit the families.
        if !self.is_dual_stack {
            controller_manager.push(("node-cidr-mask-size", "24".to_owned()));
        }
        let scheduler = [
            ("kubeconfig", file("scheduler.conf")),
            ("leader-elect", "false".to_owned()),
            ("cert-dir", file("scheduler-certs")),
        ];
        let host = self.host();
        let log = |name: &str| self.directory.join(format!("{name}.log"));
        let manager = daemon(
            host,
            &programs.controller_manager,
            &controller_manager,
            &log("kube-controller-manager"),
        )?;
        let scheduler = daemon(host, &programs.scheduler, &scheduler, &log("kube-scheduler"))?;
        self.others.extend([manager, scheduler]);
        Ok(())
    }

    /// Waits until the API server serves, and starts the others.
    pub(super) fn await_ready(&mut self, programs: &Programs) -> anyhow::Result<()> {
        self.await_server("cp", programs)?;
        self.launch_others(programs)
    }

    /// Restarts the controller manager and the scheduler. From then on, certificates are valid for `lifetime`.
    pub(super) fn sign_for(
        &mut self,
        lifetime: &'static str,
        programs: &Programs,
    ) -> anyhow::Result<()> {
        self.lifetime = lifetime;
        self.others.clear();
        self.launch_others(programs)
    }

    /// Restarts the first API server, and so ends all connections to it.
    pub(super) fn reconnect(&mut self, programs: &Programs) -> anyhow::Result<()> {
        self.kill("cp")?;
        self.revive("cp", programs)?;
        self.await_server("cp", programs)
    }

    /// Returns the URL of the first API server outside of the mesh.
    pub(super) fn public_url(&self) -> String {
        let address = self.host().addresses().iter().find(|address| address.is_ipv4());
        format!("https://{}:6443", address.expect("the host of the control plane has IPv4"))
    }

    /// Creates what `kubeadm init` creates for joining nodes: the bootstrap token and its rights.
    fn bootstrap(&self, programs: &Programs) -> anyhow::Result<()> {
        let [id, secret] = BOOTSTRAP_TOKEN;
        let group = "system:bootstrappers:kubeadm:default-node-token";
        let binding = |name: &str, role: &str, group: &str| {
            json!({
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "ClusterRoleBinding",
                "metadata": {"name": name},
                "roleRef": {
                    "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role,
                },
                "subjects": [
                    {"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": group},
                ],
            })
        };
        let approver = "system:certificates.k8s.io:certificatesigningrequests";
        self.apply(programs, &json!({"apiVersion": "v1", "kind": "List", "items": [
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "type": "bootstrap.kubernetes.io/token",
                "metadata": {"name": format!("bootstrap-token-{id}"), "namespace": "kube-system"},
                "stringData": {
                    "token-id": id,
                    "token-secret": secret,
                    "usage-bootstrap-authentication": "true",
                    "usage-bootstrap-signing": "true",
                    "auth-extra-groups": group,
                },
            },
            binding("kubelet-bootstrap", "system:node-bootstrapper", group),
            binding("node-autoapprove-bootstrap", &format!("{approver}:nodeclient"), group),
            binding(
                "node-autoapprove-rotation", &format!("{approver}:selfnodeclient"), "system:nodes",
            ),
        ]}))
    }

    /// Returns the kubeconfig with the bootstrap token, for the API server at `server`.
    pub(super) fn bootstrap_kubeconfig(&self, server: &str) -> String {
        let [id, secret] = BOOTSTRAP_TOKEN;
        // As kubeadm does. The kubelet copies it to its own kubeconfig, which pods may read.
        let ca = BASE64.encode(self.ca.pem().as_bytes());
        let cluster = json!({"server": server, "certificate-authority-data": ca});
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": cluster}],
            "users": [{"name": "bootstrap", "user": {"token": format!("{id}.{secret}")}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "bootstrap"}}],
            "current-context": "lab",
        })
        .to_string()
    }

    /// Returns the networks of the pods, as programs of Kubernetes take them.
    pub(super) fn pods(&self) -> String {
        if self.is_dual_stack { format!("{PODS},{PODS_V6}") } else { PODS.to_owned() }
    }

    /// Returns the networks of the Services, as programs of Kubernetes take them.
    fn services(&self) -> String {
        if self.is_dual_stack { format!("{SERVICES},{SERVICES_V6}") } else { SERVICES.to_owned() }
    }

    /// Returns whether nodes, pods and Services have addresses of both families.
    pub(super) fn is_dual_stack(&self) -> bool {
        self.is_dual_stack
    }

    /// Returns the host of etcd and of the first API server.
    fn host(&self) -> &Arc<Host> {
        self.servers
            .first()
            .map(|server| &server.host)
            .expect("the first API server was added at the start")
    }

    /// Runs kubectl on another host, for the API server at `server`.
    pub(super) fn kubectl_on(
        &self,
        host: &Host,
        programs: &Programs,
        server: &str,
        arguments: &[&str],
    ) -> anyhow::Result<String> {
        let arguments = [&["--server", server][..], arguments].concat();
        self.kubectl_program(programs, &arguments).run_ok(host.namespace(), COMMAND_LIMIT)
    }

    /// Returns the path of the cluster's CA certificate.
    pub(super) fn ca_file(&self) -> PathBuf {
        self.directory.join("ca.crt")
    }

    /// Creates or changes objects.
    pub(super) fn apply(&self, programs: &Programs, objects: &Value) -> anyhow::Result<()> {
        self.apply_text(programs, &objects.to_string())
    }

    /// Creates or changes the objects of a manifest, in JSON or YAML.
    pub(super) fn apply_text(&self, programs: &Programs, manifest: &str) -> anyhow::Result<()> {
        let program = self.kubectl_program(programs, &["apply", "-f", "-"]);
        program.input(manifest).run_ok(self.host().namespace(), COMMAND_LIMIT).map(drop)
    }

    /// Runs kubectl with the rights of an administrator, and returns its output.
    pub(super) fn kubectl(
        &self,
        programs: &Programs,
        arguments: &[&str],
    ) -> anyhow::Result<String> {
        self.kubectl_program(programs, arguments).run_ok(self.host().namespace(), COMMAND_LIMIT)
    }

    /// Starts kubectl as a daemon, such as for `port-forward`.
    pub(super) fn start_kubectl(
        &self,
        programs: &Programs,
        arguments: &[&str],
    ) -> anyhow::Result<Daemon> {
        let log = self.directory.join("kubectl.log");
        self.kubectl_program(programs, arguments).start(self.host().namespace(), "kubectl", &log)
    }

    fn kubectl_program(&self, programs: &Programs, arguments: &[&str]) -> Program {
        Program::new(&programs.kubectl)
            .arg("--kubeconfig")
            .arg(self.directory.join("admin.conf"))
            .args(["--cache-dir", &self.directory.join("cache").display().to_string()])
            .args(["--request-timeout", "30s"])
            .args(arguments.iter().copied())
    }
}

/// Starts a program of the control plane with these flags.
fn daemon(
    host: &Host,
    program: &Path,
    flags: &[(&str, String)],
    log: &Path,
) -> anyhow::Result<Daemon> {
    let name = program.file_name().unwrap_or_default().display().to_string();
    let flags = flags.iter().map(|(flag, value)| format!("--{flag}={value}"));
    Program::new(program).args(flags).start(host.namespace(), &name, log)
}
