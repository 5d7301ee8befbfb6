//! A worker's machine beyond its network: own mount and PID namespaces, so that several kubelets and container
//! runtimes run on one host, change no files and settings of it, and end together.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;

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
mkdir -p /var/lib/kubelet /var/lib/cni /run/containerd "$1/sysctl"
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
exec sleep infinity
"#;

/// A worker: its node of the mesh, and what runs on its machine.
pub(super) struct Machine {
    pub(super) node: Node,
    directory: PathBuf,
    kubelet: Option<Daemon>,
    proxy: Option<Daemon>,
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
        let cgroup = Cgroup { name: format!("towline-lab-{}", holder.pid()) };
        let ready = directory.join("ready");
        wait_for("mounts of the machine", START_LIMIT, || Ok(ready.exists().then_some(())))?;
        let cni = directory.join("cni");
        std::fs::create_dir_all(&cni)?;
        let config = containerd_config(&directory, programs);
        let config_file = directory.join("containerd.toml");
        replace(&config_file, &config)?;
        let containerd = inside(&holder, &programs.containerd)
            .arg("--config")
            .arg(&config_file)
            .start(host.namespace(), "containerd", &directory.join("containerd.log"))?;
        let machine = Self {
            node,
            directory,
            kubelet: None,
            proxy: None,
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

    /// Starts the kubelet with nothing but a bootstrap token, and kube-proxy.
    pub(super) fn join(
        &mut self,
        plane: &Plane,
        programs: &Programs,
        proxy_mode: &str,
    ) -> anyhow::Result<()> {
        let (name, address) = (self.node.name().to_owned(), self.node.overlay_v4()?.to_string());
        let node_ip = match self.node.status()?.overlay_addresses.iter().find(|ip| ip.is_ipv6()) {
            Some(v6) if plane.is_dual_stack() => format!("{address},{v6}"),
            _ => address.clone(),
        };
        let server = format!("https://{API_ENDPOINT}");
        let user = format!("system:node:{name}");
        let serving = plane.ca.issue(&user, "system:nodes", &[name.as_str(), address.as_str()])?;
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
            "cgroupsPerQOS": false,
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
            ("cert-dir", file("pki").display().to_string()),
            ("root-dir", file("kubelet").display().to_string()),
            ("hostname-override", name.clone()),
            ("node-ip", node_ip),
        ];
        let flags = flags.map(|(flag, value)| format!("--{flag}={value}"));
        self.kubelet = Some(self.program(&programs.kubelet).args(flags).start(
            self.host().namespace(),
            "kubelet",
            &file("kubelet.log"),
        )?);
        let certificate = file("proxy.pem");
        replace(&certificate, &plane.ca.issue("system:kube-proxy", "", &[])?.both())?;
        let text = kubeconfig(&server, &plane.ca_file(), &certificate);
        replace(&file("proxy.conf"), &text)?;
        let flags = [
            ("kubeconfig", file("proxy.conf").display().to_string()),
            ("proxy-mode", proxy_mode.to_owned()),
            ("cluster-cidr", plane.pods()),
            ("hostname-override", name),
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

    /// Stops kubelet and kube-proxy, and removes what the kubelet knows of the cluster.
    pub(super) fn reset(&mut self) -> anyhow::Result<()> {
        self.kubelet = None;
        self.proxy = None;
        for name in ["kubelet.conf", "pki"] {
            let path = self.directory.join(name);
            let removed = if path.is_dir() {
                std::fs::remove_dir_all(&path)
            } else {
                std::fs::remove_file(&path)
            };
            removed.with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }

    /// Returns an error with the last lines of a log if kubelet or kube-proxy ended.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        for daemon in [&mut self.kubelet, &mut self.proxy].into_iter().flatten() {
            daemon.check()?;
        }
        Ok(())
    }

    /// Writes the CNI's configuration for these pod networks: a bridge, and routes of the host.
    pub(super) fn write_cni(&self, pods: &[String]) -> anyhow::Result<()> {
        let ranges: Vec<_> = pods.iter().map(|subnet| json!([{"subnet": subnet}])).collect();
        let routes =
            pods.iter().map(|subnet| if subnet.contains(':') { "::/0" } else { "0.0.0.0/0" });
        let routes: Vec<_> = routes.map(|all| json!({"dst": all})).collect();
        let config = json!({
            "cniVersion": "0.4.0",
            "name": "lab",
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": "cni0",
                    "isGateway": true,
                    "hairpinMode": true,
                    "mtu": 1420,
                    "ipam": {
                        "type": "host-local",
                        "ranges": ranges,
                        "routes": routes,
                    },
                },
            ],
        });
        replace(&cni_directory(&self.directory).join("10-lab.conflist"), &config.to_string())
    }

    /// Returns the path of the kubeconfig that the kubelet writes.
    fn kubeconfig(&self) -> PathBuf {
        self.directory.join("kubelet.conf")
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

fn containerd_config(directory: &Path, programs: &Programs) -> String {
    let file = |name: &str| directory.join(name);
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
        runc = programs.runc,
        plugins = programs.plugins,
        cni = cni_directory(directory),
    )
}

/// Control groups of one machine, in every hierarchy. Dropping it removes them, once no process is in them.
#[derive(Debug)]
struct Cgroup {
    name: String,
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let mut places = vec![PathBuf::from("/sys/fs/cgroup")];
        let hierarchies = std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
        places.extend(hierarchies.map(|hierarchy| hierarchy.path()));
        for place in
            places.iter().map(|place| place.join(&self.name)).filter(|place| place.is_dir())
        {
            // The processes were killed, but the kernel may not have removed them yet.
            let _ = wait_for("empty control group", Duration::from_secs(5), || {
                remove_groups(&place);
                Ok((!place.exists()).then_some(()))
            });
        }
    }
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
