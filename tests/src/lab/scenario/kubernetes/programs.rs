//! The real programs: etcd from the machine, the API server built from the Go module proxy and kept
//! between runs.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, anyhow, bail};

use crate::lab::report::Forbidden;
use crate::lab::talk::Talk;

/// As `tests/kubernetes/go.mod` says.
const VERSION: &str = "1.34.4";

/// Where they are.
#[derive(Debug)]
pub(super) struct Programs {
    pub(super) etcd: PathBuf,
    pub(super) apiserver: PathBuf,
    /// When it was built, too.
    pub(super) kubectl: Option<PathBuf>,
}

impl Programs {
    /// Finds them, and builds the API server where it is not there yet.
    ///
    /// # Errors
    /// [`Forbidden`] without etcd or Go.
    pub(super) fn find(talk: &Talk) -> anyhow::Result<Self> {
        let etcd = in_path("etcd").ok_or_else(|| {
            anyhow!(Forbidden {
                what: "there is no etcd on this machine".to_owned(),
                remedy: "install it, for instance with `apt-get install etcd-server`".to_owned(),
            })
        })?;
        let directory = cache()?.join(format!("kubernetes-{VERSION}"));
        let apiserver = directory.join("kube-apiserver");
        if !apiserver.is_file() {
            build(talk, "kube-apiserver", &apiserver)?;
        }
        let kubectl = Some(directory.join("kubectl")).filter(|path| path.is_file());
        Ok(Self { etcd, apiserver, kubectl: kubectl.or_else(|| in_path("kubectl")) })
    }
}

/// Outside the working copy, so that it outlives it.
fn cache() -> anyhow::Result<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    Ok(base.context("neither XDG_CACHE_HOME nor HOME is set")?.join("towline-lab"))
}

fn build(talk: &Talk, name: &str, place: &Path) -> anyhow::Result<()> {
    let go = in_path("go").ok_or_else(|| {
        anyhow!(Forbidden {
            what: format!("{name} is not built yet and there is no Go on this machine"),
            remedy: "install Go 1.24 or later (`apt-get install golang-go`)".to_owned(),
        })
    })?;
    talk.step(&format!("building {name} {VERSION}: once, and it takes a quarter of an hour"));
    std::fs::create_dir_all(place.parent().unwrap_or(Path::new("/")))?;
    let ended = Command::new(go)
        .args(["build", "-p", "2", "-trimpath", "-mod=readonly", "-ldflags"])
        .arg(format!("-s -w -X k8s.io/component-base/version.gitVersion=v{VERSION} -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=34"))
        .arg("-o")
        .arg(place)
        .arg(format!("k8s.io/kubernetes/cmd/{name}"))
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("kubernetes"))
        .env("CGO_ENABLED", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("cannot run go")?;
    if !ended.success() {
        bail!("{name} does not build: see above");
    }
    Ok(())
}

fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
}
