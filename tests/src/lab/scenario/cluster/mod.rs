//! `cargo lab cluster`: a whole Kubernetes cluster over the mesh. The control plane is in the cloud, and a worker
//! behind NAT in each of two datacenters. All programs are the real ones: etcd, API server, controller manager,
//! scheduler, kubelet, kube-proxy, containerd and runc.
//!
//! ```text
//!   cp: etcd, API server, controller manager, scheduler ── internet ──┬── router-a ── worker-a: kubelet, pods
//!                                                                     └── router-b ── worker-b: kubelet, pods
//! ```
//!
//! A bridge connects the pods of a worker; the mesh routes between workers, or flannel tunnels between them over the
//! mesh. The kubelets know the API server only by the endpoint of their own agent, and have nothing but a bootstrap
//! token.
//!
//! | file | owns |
//! |---|---|
//! | `programs.rs` | finding and building the programs, and the image of the agent |
//! | `plane.rs` | the control plane, and kubectl |
//! | `machine.rs` | the namespaces, containerd, kubelet and kube-proxy of a worker |
//! | `daemon_set.rs` | the agent in a pod, in the forms of the cluster that have it |
//! | `flannel.rs` | flannel, in the forms of the cluster that have it |
//! | `form.rs` | the checks of one form of the cluster |
//! | `mod.rs` | options and results |

mod daemon_set;
mod flannel;
mod form;
mod machine;
mod plane;
mod programs;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use clap::ValueEnum;
use serde::Serialize;

use super::Setting;
use super::kubernetes::programs::go_build;
use crate::lab::interrupt::wait_up_to;
use crate::lab::package::archive::Entry;
use crate::lab::package::image_of;
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Forbidden, Promises, WrongUsage, round};
use programs::Programs;

/// Command line options of `cargo lab cluster`.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// How pods of different workers reach each other
    #[arg(long, value_enum, default_value_t, conflicts_with = "full")]
    cni: Cni,
    /// Mode of kube-proxy
    #[arg(long, value_enum, default_value_t, conflicts_with = "full")]
    proxy: Proxy,
    /// Give nodes, pods and Services addresses of both families
    #[arg(long, conflicts_with = "full")]
    dual_stack: bool,
    /// Run the agent of a third worker in a pod, by the DaemonSet of the chart
    #[arg(long, conflicts_with_all = ["full", "dual_stack"])]
    daemon_set: bool,
    /// Run every form of the cluster, one after the other
    #[arg(long)]
    full: bool,
}

/// How pods of different workers reach each other. A bridge connects those of one worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Cni {
    /// By the mesh alone.
    #[default]
    Bridge,
    /// By the mesh, to which flannel's routes lead as well.
    HostGw,
    /// By flannel's VXLAN, whose datagrams the mesh carries.
    Flannel,
}

/// Mode of kube-proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Proxy {
    /// Rules of iptables.
    #[default]
    Iptables,
    /// Rules of nftables.
    Nftables,
}

/// A form of the cluster.
#[derive(Debug, Clone, Copy)]
struct Form {
    cni: Cni,
    proxy: Proxy,
    is_dual_stack: bool,
    has_daemon_set: bool,
}

impl Form {
    /// All forms, for `--full`.
    const ALL: [Self; 5] = [
        Self { has_daemon_set: true, ..Self::of(Cni::Bridge, Proxy::Iptables) },
        Self::of(Cni::Bridge, Proxy::Nftables),
        Self { is_dual_stack: true, ..Self::of(Cni::Bridge, Proxy::Nftables) },
        Self::of(Cni::HostGw, Proxy::Iptables),
        Self::of(Cni::Flannel, Proxy::Iptables),
    ];

    const fn of(cni: Cni, proxy: Proxy) -> Self {
        Self { cni, proxy, is_dual_stack: false, has_daemon_set: false }
    }

    /// Returns the form in words.
    fn name(self) -> String {
        let families = if self.is_dual_stack { "dual stack" } else { "IPv4" };
        format!("{}, {}, {families}", self.cni.name(), self.proxy.name())
    }
}

impl Cni {
    fn name(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::HostGw => "host-gw",
            Self::Flannel => "flannel",
        }
    }

    /// Returns flannel's name of its backend, or `None` if flannel does not run.
    fn backend(self) -> Option<&'static str> {
        match self {
            Self::Bridge => None,
            Self::HostGw => Some("host-gw"),
            Self::Flannel => Some("vxlan"),
        }
    }

    /// Returns whether the CNI tunnels, so that the mesh carries no packets of pods themselves.
    fn tunnels(self) -> bool {
        match self {
            Self::Bridge | Self::HostGw => false,
            Self::Flannel => true,
        }
    }
}

impl Proxy {
    fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
        }
    }
}

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Cluster {
    /// Checks in the order in which they ran.
    pub arrows: Vec<Arrow>,
    /// What an operator typed in the first form of the cluster, and the output, for README.
    pub screen: String,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Result of one check.
#[derive(Debug, Serialize)]
pub struct Arrow {
    /// Form of the cluster, and name of the check.
    pub name: String,
    /// True if the check succeeded in time.
    pub ok: bool,
    /// Time in milliseconds until it succeeded, or until the lab gave up.
    pub ms: f64,
}

/// Runs the scenario and returns its results.
///
/// # Errors
/// Returns [`Forbidden`] if a program is missing, or if the lab is not root of the machine.
pub fn run(setting: &Setting, options: &Options) -> anyhow::Result<Cluster> {
    if setting.rank == Rank::Rootless {
        return Err(anyhow!(Forbidden {
            what: "kubelet and containerd need the real root".to_owned(),
            remedy: "run the lab as root, without --rootless".to_owned(),
        }));
    }
    if options.daemon_set && options.cni.tunnels() {
        let message = "pods of the third worker reach the others only without a tunnel of the CNI";
        return Err(anyhow!(WrongUsage(message.to_owned())));
    }
    let one = [Form {
        cni: options.cni,
        proxy: options.proxy,
        is_dual_stack: options.dual_stack,
        has_daemon_set: options.daemon_set,
    }];
    let forms = if options.full { &Form::ALL[..] } else { &one[..] };
    if forms.iter().any(|form| form.cni.tunnels()) {
        flannel::require_vxlan()?;
    }
    let mut programs = Programs::find(&setting.output)?;
    let built = tempfile::tempdir()?;
    let images = images(built.path())?;
    if forms.iter().any(|form| form.cni.backend().is_some()) {
        programs.flannel = Some(programs::build_flannel(&setting.output, built.path())?);
    }
    if forms.iter().any(|form| form.has_daemon_set) {
        programs.agent = Some(programs::build_agent(built.path())?);
    }
    let mut cluster = Cluster::default();
    let mut promises = Promises::new();
    for form in forms {
        let mut checks = Checks {
            form: form.name(),
            arrows: &mut cluster.arrows,
            screen: &mut cluster.screen,
            promises: &mut promises,
        };
        let played = form::play(setting, &programs, &images, *form, &mut checks);
        if let Err(error) = played {
            promises.fail(format!("{}: {error:#}", form.name()));
        }
    }
    cluster.failed = promises.into_failed();
    Ok(cluster)
}

/// Builds the program of the pods, and the images as archives. Returns their paths.
fn images(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let program = directory.join("testpod");
    go_build("testpod", ".", "./testpod", &program)?;
    let bytes = std::fs::read(&program)?;
    let own = Entry::file("usr/bin/testpod", 0o755, bytes.clone());
    let pause = [own.clone()];
    // The second name is that of the program that `kubectl cp` runs.
    let pods = [
        own,
        Entry::file("usr/bin/tar", 0o755, bytes),
        Entry::file("tmp/empty", 0o644, Vec::new()),
    ];
    let mut paths = Vec::new();
    for (name, entrypoint, files) in [
        (machine::PAUSE, &["/usr/bin/testpod", "pause"][..], &pause[..]),
        (machine::IMAGE, &["/usr/bin/testpod"][..], &pods[..]),
    ] {
        let path = directory.join(format!("{}.tar", paths.len()));
        std::fs::write(&path, image_of(name, "lab", entrypoint, files)?)?;
        paths.push(path);
    }
    Ok(paths)
}

/// Checks of one form, with the place for their results.
struct Checks<'a> {
    form: String,
    arrows: &'a mut Vec<Arrow>,
    screen: &'a mut String,
    promises: &'a mut Promises,
}

impl Checks<'_> {
    /// Tries a check until it holds, for at most `limit`. An error is a check that does not hold yet. Returns
    /// whether it held.
    fn check(
        &mut self,
        name: &str,
        limit: Duration,
        mut holds: impl FnMut() -> anyhow::Result<bool>,
    ) -> anyhow::Result<bool> {
        let begun = Instant::now();
        let mut last = None;
        let held = wait_up_to(limit, || {
            let held = holds().unwrap_or_else(|error| {
                last = Some(format!("{error:#}"));
                false
            });
            Ok(held.then_some(()))
        })?;
        let name = format!("{}: {name}", self.form);
        let ok = held.is_some();
        self.promises.hold(ok, || match last {
            Some(error) => format!("{name}: {error}"),
            None => name.clone(),
        });
        self.arrows.push(Arrow { name, ok, ms: round(begun.elapsed().as_secs_f64() * 1e3) });
        Ok(ok)
    }
}

impl Figures for Cluster {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        for Arrow { name, ok, ms } in &self.arrows {
            let _ = writeln!(text, "{}  {name} ({ms} ms)", if *ok { "ok    " } else { "FAILED" });
        }
        if !self.screen.is_empty() {
            let _ = writeln!(text, "\n{}\n", self.screen.trim_end());
        }
        let _ = write!(text, "{} checks", self.arrows.len());
        text
    }
}
