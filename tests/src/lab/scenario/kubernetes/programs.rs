//! Programs of the Kubernetes control plane: etcd as installed on this machine, and the API server,
//! which is built from the Go module proxy and cached between runs.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, anyhow, bail};

use crate::lab::output::ProgressOutput;
use crate::lab::report::Forbidden;

/// Version of the API server. Must match `tests/kubernetes/go.mod`.
const VERSION: &str = "1.34.4";

/// Paths of the programs.
#[derive(Debug)]
pub(super) struct Programs {
    pub(super) etcd: PathBuf,
    pub(super) apiserver: PathBuf,
    /// Path of kubectl, if it is in the cache or installed.
    pub(super) kubectl: Option<PathBuf>,
}

impl Programs {
    /// Finds the programs. Builds the API server if it is not in the cache.
    ///
    /// # Errors
    /// Returns [`Forbidden`] if etcd is not installed, or if a build is needed and Go is not
    /// installed.
    pub(super) fn find(output: &ProgressOutput) -> anyhow::Result<Self> {
        let etcd = in_path("etcd").ok_or_else(|| {
            anyhow!(Forbidden {
                what: "etcd is not installed".to_owned(),
                remedy: "install etcd, for instance with `apt-get install etcd-server`".to_owned(),
            })
        })?;
        let apiserver = built(output, "kube-apiserver")?;
        let kubectl = Some(apiserver.with_file_name("kubectl")).filter(|path| path.is_file());
        Ok(Self { etcd, apiserver, kubectl: kubectl.or_else(|| in_path("kubectl")) })
    }
}

/// Returns the cache directory. It is outside of the checkout, so that it outlives it.
fn cache() -> anyhow::Result<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    Ok(base.context("neither XDG_CACHE_HOME nor HOME is set")?.join("towline-lab"))
}

/// Builds a program of Kubernetes at `place`.
fn build(output: &ProgressOutput, name: &str, place: &Path) -> anyhow::Result<()> {
    output.step(&format!("building {name} {VERSION}: only once, takes up to 15 minutes"));
    go_build(name, ".", &format!("k8s.io/kubernetes/cmd/{name}"), place)
}

/// Returns the path of a program of Kubernetes, which is built unless it is in the cache.
///
/// # Errors
/// [`Forbidden`] if a build is needed and Go is not installed.
pub(in crate::lab::scenario) fn built(
    output: &ProgressOutput,
    name: &str,
) -> anyhow::Result<PathBuf> {
    let place = cache()?.join(format!("kubernetes-{VERSION}")).join(name);
    if !place.is_file() {
        build(output, name, &place)?;
    }
    Ok(place)
}

/// Builds a Go package of the module `module` below `tests/kubernetes`, or of its dependencies, at `place`, as a
/// static program.
///
/// # Errors
/// [`Forbidden`] if Go is not installed.
pub(in crate::lab::scenario) fn go_build(
    name: &str,
    module: &str,
    package: &str,
    place: &Path,
) -> anyhow::Result<()> {
    let go = in_path("go").ok_or_else(|| {
        anyhow!(Forbidden {
            what: format!("{name} must be built and Go is not installed"),
            remedy: "install Go 1.25 or later (`apt-get install golang-go`)".to_owned(),
        })
    })?;
    std::fs::create_dir_all(place.parent().unwrap_or(Path::new("/")))?;
    let ended = Command::new(go)
        .args(["build", "-p", "2", "-trimpath", "-mod=readonly", "-ldflags"])
        .arg(format!("-s -w -X k8s.io/component-base/version.gitVersion=v{VERSION} -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=34"))
        .arg("-o")
        .arg(place)
        .arg(package)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("kubernetes").join(module))
        .env("CGO_ENABLED", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("cannot run go")?;
    if !ended.success() {
        bail!("cannot build {name}: see the output above");
    }
    Ok(())
}

/// Returns the path of a program in `PATH`.
pub(in crate::lab::scenario) fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
}
