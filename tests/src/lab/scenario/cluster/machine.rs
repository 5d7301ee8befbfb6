//! A worker's machine beyond its network: own mount and PID namespaces, so that several kubelets and container
//! runtimes run on one host, change no files and settings of it, and end together.

use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};

use super::Form;
use super::flannel::{self, Run, SUBNET_FILE};
use super::plane::Plane;
use super::programs::Programs;
use crate::cluster::{kubeconfig, replace};
use crate::lab::interrupt::wait_for;
use crate::lab::mesh::Node;
use crate::lab::process::{Daemon, Program};
use crate::lab::topology::Host;

/// Limit for a program to start.
const START_LIMIT: Duration = Duration::from_secs(60);
/// Address of the API endpoint of each worker's agent.
pub(super) const API_ENDPOINT: &str = "127.0.0.1:7445";
/// Image of the pods.
pub(super) const IMAGE: &str = "docker.io/library/testpod:lab";
/// Image of the sandbox that holds the namespaces of a pod.
pub(super) const PAUSE: &str = "docker.io/library/pause:lab";

/// Prepares the mounts of a machine. The first argument is its directory. Files of the host that kubelet and
/// containerd would write are hidden. A kubelet sets some sysctls of the whole host, unless they have the
/// expected values: it reads them from files of its own.
const PREPARE: &str = r#"
set -e
for directory in /var/lib /var/log /run; do
    mount -t tmpfs tmpfs "$directory"
done
mkdir -p /var/lib/kubelet /var/lib/cni /run/containerd "$1/sysctl" "$1/etc"
# The machine changes a copy of /etc, which is in memory.
mount -t tmpfs -o mode=0755 tmpfs "$1/etc"
cp -a /etc/. "$1/etc/"
mount --move "$1/etc" /etc
mkdir -p /etc/kubernetes /etc/cni/net.d
while read -r name value; do
    file="$1/sysctl/$(echo "$name" | tr / -)"
    echo "$value" > "$file"
    mount --bind "$file" "/proc/sys/$name"
done <<END
vm/overcommit_memory 1
vm/panic_on_oom 0
kernel/panic 10
kernel/panic_on_oops 1
kernel/keys/root_maxkeys 1000000
kernel/keys/root_maxbytes 25000000
END
touch "$1/ready"
# As the first process, it reaps what containerd's shims leave behind.
while :; do
    sleep 3600 &
    wait
done
"#;

/// Places of what Kubernetes has on a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// The lab's directory, so that an agent outside of the machine reads its files. The kubelet uses the endpoint
    /// and the mesh addresses of this agent.
    Lab,
    /// Those of kubeadm, for an agent in a pod of the machine. The kubelet reaches the API server without the mesh.
    Kubeadm,
}

/// A worker: its node of the mesh, and what runs on its machine.
pub(super) struct Machine {
    pub(super) node: Node,
    directory: PathBuf,
    layout: Layout,
    kubelet: Option<Daemon>,
    proxy: Option<Daemon>,
    flannel: Option<Daemon>,
    _containerd: Daemon,
    /// Process that holds the namespaces. Its end is that of all processes in them.
    holder: Daemon,
    /// Dropped last, when no process is in it.
    cgroup: Cgroup,
}

impl Machine {
    /// Starts the machine with containerd, and imports the images.
    pub(super) fn start(
        node: Node,
        layout: Layout,
        directory: &Path,
        programs: &Programs,
        images: &[PathBuf],
    ) -> anyhow::Result<Self> {
        let directory = directory.join(format!("{}-machine", node.name()));
        std::fs::create_dir(&directory)?;
        let host = Arc::clone(node.host());
        let holder = Program::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc"])
            .args(["sh", "-c", PREPARE, "sh"])
            .arg(&directory)
            .start(host.namespace(), "holder of the namespaces", &directory.join("holder.log"))?;
        let cgroup = Cgroup::create(format!("towline-lab-{}", holder.pid()))?;
        let ready = directory.join("ready");
        wait_for("mounts of the machine", START_LIMIT, || Ok(ready.exists().then_some(())))?;
        if layout == Layout::Lab {
            std::fs::create_dir_all(cni_directory(&directory))?;
        }
        let plugins = plugins(&directory, programs)?;
        let config = containerd_config(&directory, layout, &programs.runc, &plugins);
        let config_file = directory.join("containerd.toml");
        replace(&config_file, &config)?;
        let containerd = inside(&holder, &programs.containerd)
            .arg("--config")
            .arg(&config_file)
            .start(host.namespace(), "containerd", &directory.join("containerd.log"))?;
        let machine = Self {
            node,
            directory,
            layout,
            kubelet: None,
            proxy: None,
            flannel: None,
            _containerd: containerd,
            holder,
            cgroup,
        };
        wait_for("answer from containerd", START_LIMIT, || {
            Ok(machine.ctr(programs, &["version"]).ok())
        })?;
        for image in images {
            let image = image.display().to_string();
            machine.ctr(programs, &["images", "import", "--snapshotter", "native", &image])?;
        }
        Ok(machine)
    }

    /// Returns the host of the machine.
    pub(super) fn host(&self) -> &Host {
        self.node.host()
    }

    /// Starts the kubelet with nothing but a bootstrap token.
    pub(super) fn join(&mut self, plane: &Plane, programs: &Programs) -> anyhow::Result<()> {
        let name = self.node.name().to_owned();
        let addresses = self.addresses(plane)?;
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        let server = self.server(plane);
        let user = format!("system:node:{name}");
        let names: Vec<&str> =
            std::iter::once(&name).chain(&addresses).map(String::as_str).collect();
        let serving = plane.ca.issue(&user, "system:nodes", &names)?;
        serving.write(&self.directory, "serving")?;
        let file = |name: &str| self.directory.join(name);
        replace(&file("bootstrap.conf"), &plane.bootstrap_kubeconfig(&server))?;
        replace(&file("resolv.conf"), "")?;
        let config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": "0.0.0.0",
            "authentication": {
                "anonymous": {"enabled": false},
                "webhook": {"enabled": true},
                "x509": {"clientCAFile": plane.ca_file()},
            },
            "authorization": {"mode": "Webhook"},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": format!("/{}", self.cgroup.name),
            // Without them, the runtime would not place pods below the root above.
            "cgroupsPerQOS": true,
            "clusterDNS": ["10.96.0.10"],
            "clusterDomain": "cluster.local",
            "containerRuntimeEndpoint":
                format!("unix://{}", file("containerd.sock").display()),
            "enforceNodeAllocatable": ["none"],
            "evictionHard": {
                "imagefs.available": "0%", "memory.available": "0%", "nodefs.available": "0%",
                "nodefs.inodesFree": "0%", "imagefs.inodesFree": "0%",
            },
            "failCgroupV1": false,
            "failSwapOn": false,
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "localStorageCapacityIsolation": false,
            "nodeStatusUpdateFrequency": "4s",
            "podLogsDir": file("pod-logs"),
            "readOnlyPort": 0,
            "resolvConf": file("resolv.conf"),
            "rotateCertificates": true,
            "tlsCertFile": file("serving.crt"),
            "tlsPrivateKeyFile": file("serving.key"),
        });
        replace(&file("kubelet.json"), &config.to_string())?;
        let flags = [
            ("config", file("kubelet.json").display().to_string()),
            ("bootstrap-kubeconfig", file("bootstrap.conf").display().to_string()),
            ("kubeconfig", self.kubeconfig().display().to_string()),
            ("cert-dir", self.pki().display().to_string()),
            ("root-dir", file("kubelet").display().to_string()),
            ("hostname-override", name),
            ("node-ip", addresses.join(",")),
        ];
        let flags = flags.map(|(flag, value)| format!("--{flag}={value}"));
        self.kubelet = Some(self.program(&programs.kubelet).args(flags).start(
            self.host().namespace(),
            "kubelet",
            &file("kubelet.log"),
        )?);
        Ok(())
    }

    /// Starts kube-proxy. It waits for the addresses of the Node, but only for 30 s.
    pub(super) fn start_proxy(
        &mut self,
        plane: &Plane,
        programs: &Programs,
        mode: &str,
    ) -> anyhow::Result<()> {
        let server = self.server(plane);
        let file = |name: &str| self.directory.join(name);
        let certificate = file("proxy.pem");
        replace(&certificate, &plane.ca.issue("system:kube-proxy", "", &[])?.both())?;
        let text = kubeconfig(&server, &plane.ca_file(), &certificate);
        replace(&file("proxy.conf"), &text)?;
        let flags = [
            ("kubeconfig", file("proxy.conf").display().to_string()),
            ("proxy-mode", mode.to_owned()),
            ("cluster-cidr", plane.pods()),
            ("hostname-override", self.node.name().to_owned()),
            // The machine has addresses that are not those of the Node.
            ("nodeport-addresses", "0.0.0.0/0".to_owned()),
            // These settings belong to the whole host.
            ("conntrack-max-per-core", "0".to_owned()),
            ("conntrack-tcp-timeout-established", "0s".to_owned()),
            ("conntrack-tcp-timeout-close-wait", "0s".to_owned()),
        ];
        let flags = flags.map(|(flag, value)| format!("--{flag}={value}"));
        self.proxy = Some(self.program(&programs.proxy).args(flags).start(
            self.host().namespace(),
            "kube-proxy",
            &file("kube-proxy.log"),
        )?);
        Ok(())
    }

    /// Starts flannel, once the Node has a pod network.
    pub(super) fn start_flannel(
        &mut self,
        plane: &Plane,
        programs: &Programs,
        form: Form,
    ) -> anyhow::Result<()> {
        let flannel = programs.flannel.as_ref().context("flannel was not built")?;
        let run = Run {
            name: self.node.name(),
            server: &format!("https://{API_ENDPOINT}"),
            directory: &self.directory,
            subnet_file: Path::new(SUBNET_FILE),
        };
        let program = self.program(&flannel.daemon);
        let daemon = flannel::start(run, program, plane, self.host(), form)?;
        self.flannel = Some(daemon);
        Ok(())
    }

    /// Stops kubelet, kube-proxy and flannel, and removes what they know of the cluster.
    pub(super) fn reset(&mut self) -> anyhow::Result<()> {
        self.kubelet = None;
        self.proxy = None;
        let mut known = vec![self.seen(&self.kubeconfig()), self.seen(&self.pki())];
        if self.flannel.take().is_some() {
            known.push(self.seen(Path::new(SUBNET_FILE)));
        }
        for path in known {
            let removed = if path.is_dir() {
                std::fs::remove_dir_all(&path)
            } else {
                std::fs::remove_file(&path)
            };
            removed.with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }

    /// Returns an error with the last lines of a log if kubelet, kube-proxy or flannel ended.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        let Self { kubelet, proxy, flannel, .. } = self;
        for daemon in [kubelet, proxy, flannel].into_iter().flatten() {
            daemon.check()?;
        }
        Ok(())
    }

    /// Writes the CNI's configuration: flannel's plugin, which knows the pod networks from flannel, or a bridge with
    /// these pod networks.
    pub(super) fn write_cni(&self, pods: &[String]) -> anyhow::Result<()> {
        let ranges: Vec<_> = pods.iter().map(|subnet| json!([{"subnet": subnet}])).collect();
        let routes =
            pods.iter().map(|subnet| if subnet.contains(':') { "::/0" } else { "0.0.0.0/0" });
        let routes: Vec<_> = routes.map(|all| json!({"dst": all})).collect();
        let plugin = if self.flannel.is_some() {
            json!({"type": "flannel"})
        } else {
            json!({
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "hairpinMode": true,
                "mtu": 1420,
                "ipam": {"type": "host-local", "ranges": ranges, "routes": routes},
            })
        };
        let config = json!({"cniVersion": "0.4.0", "name": "lab", "plugins": [plugin]});
        let directory = match self.layout {
            Layout::Lab => cni_directory(&self.directory),
            Layout::Kubeadm => self.seen(Path::new(CNI_DIRECTORY)),
        };
        replace(&directory.join("10-lab.conflist"), &config.to_string())
    }

    /// Returns the path of the kubeconfig that the kubelet writes.
    fn kubeconfig(&self) -> PathBuf {
        match self.layout {
            Layout::Lab => self.directory.join("kubelet.conf"),
            Layout::Kubeadm => PathBuf::from("/etc/kubernetes/kubelet.conf"),
        }
    }

    /// Returns the directory of the certificates that the kubelet gets.
    fn pki(&self) -> PathBuf {
        match self.layout {
            Layout::Lab => self.directory.join("pki"),
            Layout::Kubeadm => PathBuf::from("/var/lib/kubelet/pki"),
        }
    }

    /// Returns the URL at which kubelet and kube-proxy reach an API server.
    fn server(&self, plane: &Plane) -> String {
        match self.layout {
            Layout::Lab => format!("https://{API_ENDPOINT}"),
            Layout::Kubeadm => plane.public_url(),
        }
    }

    /// Returns the addresses of the Node.
    fn addresses(&self, plane: &Plane) -> anyhow::Result<Vec<IpAddr>> {
        let all = match self.layout {
            Layout::Lab => self.node.status()?.overlay_addresses,
            Layout::Kubeadm => self.host().addresses().to_vec(),
        };
        let v4 = all.iter().find(|ip| ip.is_ipv4()).context("the worker has no IPv4 address")?;
        let v6 = all.iter().find(|ip| ip.is_ipv6() && plane.is_dual_stack());
        Ok(std::iter::once(v4).chain(v6).copied().collect())
    }

    /// Returns the name of the file that the current client certificate of the kubelet is in.
    pub(super) fn certificate(&self) -> anyhow::Result<PathBuf> {
        let link = self.seen(&self.pki().join("kubelet-client-current.pem"));
        std::fs::read_link(&link).with_context(|| format!("cannot read {}", link.display()))
    }

    /// Returns the path at which the lab sees a file of the machine.
    fn seen(&self, path: &Path) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{}", self.holder.pid(), path.display()))
    }

    fn ctr(&self, programs: &Programs, arguments: &[&str]) -> anyhow::Result<String> {
        self.program(&programs.ctr)
            .arg("--address")
            .arg(self.directory.join("containerd.sock"))
            .args(["--namespace", "k8s.io"])
            .args(arguments.iter().copied())
            .run_ok(self.host().namespace(), START_LIMIT)
    }

    fn program(&self, program: &Path) -> Program {
        inside(&self.holder, program)
    }
}

/// Returns the section `[kubernetes]` of the agent of a worker, whose machine will have its files below
/// `directory`.
pub(super) fn agent_section(directory: &Path, name: &str) -> String {
    let machine = directory.join(format!("{name}-machine"));
    format!(
        "[kubernetes]\nkubeconfig = {:?}\ncni_dir = {:?}\napi_endpoint = \"{API_ENDPOINT}\"\n",
        machine.join("kubelet.conf"),
        cni_directory(&machine),
    )
}

/// Directory of the CNI's configuration on a machine of kubeadm.
const CNI_DIRECTORY: &str = "/etc/cni/net.d";

fn cni_directory(machine: &Path) -> PathBuf {
    machine.join("cni")
}

/// Returns a program that runs in the namespaces of `holder`, and ends when the lab kills the process that it
/// started.
fn inside(holder: &Daemon, program: &Path) -> Program {
    let pid = holder.pid();
    Program::new("nsenter")
        .arg(format!("--mount=/proc/{pid}/ns/mnt"))
        .arg(format!("--pid=/proc/{pid}/ns/pid_for_children"))
        .args(["setpriv", "--pdeathsig", "KILL"])
        .arg(program)
}

/// Creates the directory of the CNI plugins: those of this machine's package, and flannel's if it was built.
fn plugins(directory: &Path, programs: &Programs) -> anyhow::Result<PathBuf> {
    let plugins = directory.join("plugins");
    std::fs::create_dir(&plugins)?;
    for entry in std::fs::read_dir(&programs.plugins)? {
        let entry = entry?;
        symlink(entry.path(), plugins.join(entry.file_name()))?;
    }
    if let Some(flannel) = &programs.flannel {
        let place = plugins.join("flannel");
        std::fs::copy(&flannel.plugin, &place)
            .with_context(|| format!("cannot write {}", place.display()))?;
    }
    Ok(plugins)
}

fn containerd_config(directory: &Path, layout: Layout, runc: &Path, plugins: &Path) -> String {
    let file = |name: &str| directory.join(name);
    let cni = match layout {
        Layout::Lab => cni_directory(directory),
        Layout::Kubeadm => PathBuf::from(CNI_DIRECTORY),
    };
    format!(
        r#"version = 2
root = {root:?}
state = {state:?}

[grpc]
address = {address:?}

[plugins."io.containerd.internal.v1.opt"]
path = {opt:?}

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
disable_apparmor = true
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
BinaryName = {runc:?}
SystemdCgroup = false

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = {plugins:?}
conf_dir = {cni:?}
"#,
        root = file("containerd-root"),
        state = file("containerd-state"),
        address = file("containerd.sock"),
        opt = file("containerd-opt"),
    )
}

/// Control groups of one machine, in every hierarchy. Dropping it removes them, once no process is in them.
#[derive(Debug)]
struct Cgroup {
    name: String,
}

impl Cgroup {
    /// Creates the groups: a kubelet expects that those of its root exist.
    fn create(name: String) -> anyhow::Result<Self> {
        let group = Self { name };
        for hierarchy in hierarchies()? {
            // In version 2, the kubelet needs these controllers below the root.
            let controllers = hierarchy.join("cgroup.subtree_control");
            if hierarchy.ends_with("sys/fs/cgroup") {
                std::fs::write(&controllers, "+cpu +cpuset +memory +pids")
                    .with_context(|| format!("cannot write {}", controllers.display()))?;
            }
            let place = hierarchy.join(&group.name);
            std::fs::create_dir(&place)
                .with_context(|| format!("cannot create {}", place.display()))?;
        }
        Ok(group)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for hierarchy in hierarchies().unwrap_or_default() {
            let place = hierarchy.join(&self.name);
            // The processes were killed, but the kernel may not have removed them yet.
            let _ = wait_for("empty control group", Duration::from_secs(5), || {
                remove_groups(&place);
                Ok((!place.exists()).then_some(()))
            });
        }
    }
}

/// Returns the mounted hierarchies: the only one of version 2, or those of version 1, beside which there may be one
/// of version 2.
fn hierarchies() -> anyhow::Result<Vec<PathBuf>> {
    let mount = PathBuf::from("/sys/fs/cgroup");
    if mount.join("cgroup.controllers").exists() {
        return Ok(vec![mount]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&mount)? {
        let entry = entry?;
        // Links are further names of a hierarchy.
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Removes a control group and those below it that are empty.
fn remove_groups(group: &Path) {
    for entry in std::fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(group);
}

/// Returns a pod with one container of the test program. The scheduler places it by the node's name.
pub(super) fn pod(name: &str, node: &str, arguments: &[&str]) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": node},
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "testpod", "image": IMAGE, "imagePullPolicy": "Never", "args": arguments,
            }],
        },
    })
}
