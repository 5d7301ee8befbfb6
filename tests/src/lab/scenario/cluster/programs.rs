//! Programs of a whole cluster: those of Kubernetes are built from the Go module proxy and cached between runs,
//! the others are packages of this machine.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};

use crate::lab::output::ProgressOutput;
use crate::lab::package::build_image;
use crate::lab::report::Forbidden;
use crate::lab::scenario::kubernetes::programs::{built, go_build, in_path};

/// Directory of the CNI plugins of Debian's package.
const PLUGINS: &str = "/usr/lib/cni";

/// Paths of the programs.
#[derive(Debug)]
pub(super) struct Programs {
    pub(super) etcd: PathBuf,
    pub(super) containerd: PathBuf,
    pub(super) ctr: PathBuf,
    pub(super) runc: PathBuf,
    /// Directory of the CNI plugins.
    pub(super) plugins: PathBuf,
    pub(super) apiserver: PathBuf,
    pub(super) controller_manager: PathBuf,
    pub(super) scheduler: PathBuf,
    pub(super) proxy: PathBuf,
    pub(super) kubelet: PathBuf,
    pub(super) kubectl: PathBuf,
    /// flannel, once it was built for a form of the cluster.
    pub(super) flannel: Option<Flannel>,
    /// Image of the agent, once it was built for a form of the cluster.
    pub(super) agent: Option<AgentImage>,
}

impl Programs {
    /// Finds the programs, and builds those of Kubernetes that are not in the cache.
    ///
    /// # Errors
    /// Returns [`Forbidden`] if a package or Go is not installed. This is found before anything is built.
    pub(super) fn find(output: &ProgressOutput) -> anyhow::Result<Self> {
        let etcd = installed("etcd", "etcd-server")?;
        let containerd = installed("containerd", "containerd")?;
        let ctr = installed("ctr", "containerd")?;
        let runc = installed("runc", "runc")?;
        for (name, package) in [
            ("iptables", "iptables"),
            ("nft", "nftables"),
            ("unshare", "util-linux"),
            ("nsenter", "util-linux"),
            ("setpriv", "util-linux"),
        ] {
            installed(name, package)?;
        }
        let plugins = Path::new(PLUGINS).to_owned();
        for plugin in ["bridge", "host-local", "loopback"] {
            if !plugins.join(plugin).is_file() {
                return Err(missing(plugin, "containernetworking-plugins"));
            }
        }
        Ok(Self {
            etcd,
            containerd,
            ctr,
            runc,
            plugins,
            apiserver: built(output, "kube-apiserver")?,
            controller_manager: built(output, "kube-controller-manager")?,
            scheduler: built(output, "kube-scheduler")?,
            proxy: built(output, "kube-proxy")?,
            kubelet: built(output, "kubelet")?,
            kubectl: built(output, "kubectl")?,
            flannel: None,
            agent: None,
        })
    }
}

/// Programs of flannel.
#[derive(Debug)]
pub(super) struct Flannel {
    pub(super) daemon: PathBuf,
    /// CNI plugin of the type `flannel`.
    pub(super) plugin: PathBuf,
}

/// Builds the programs of flannel in `directory`. Go caches what they consist of.
pub(super) fn build_flannel(output: &ProgressOutput, directory: &Path) -> anyhow::Result<Flannel> {
    output.step("building flannel: takes some minutes the first time");
    let (daemon, plugin) = (directory.join("flanneld"), directory.join("flannel"));
    go_build("flannel", "flannel", ".", &daemon)?;
    go_build("flannel's plugin", "flannel", "./plugin", &plugin)?;
    Ok(Flannel { daemon, plugin })
}

/// The image of the agent, as archives.
#[derive(Debug)]
pub(super) struct AgentImage {
    pub(super) archives: Vec<PathBuf>,
    /// Name of the image by its digest.
    pub(super) digest_name: String,
}

/// Builds the image of the agent in `directory`.
pub(super) fn build_agent(directory: &Path) -> anyhow::Result<AgentImage> {
    let image = build_image()?;
    let mut archives = Vec::new();
    for (name, bytes) in
        [("agent-by-version.tar", &image.by_version), ("agent-by-digest.tar", &image.by_digest)]
    {
        let path = directory.join(name);
        std::fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
        archives.push(path);
    }
    Ok(AgentImage { archives, digest_name: image.digest_name })
}

/// Returns the path of a program of a Debian package.
fn installed(name: &str, package: &str) -> anyhow::Result<PathBuf> {
    in_path(name).ok_or_else(|| missing(name, package))
}

fn missing(name: &str, package: &str) -> anyhow::Error {
    anyhow!(Forbidden {
        what: format!("{name} is not installed"),
        remedy: format!("install it, for instance with `apt-get install {package}`"),
    })
}
