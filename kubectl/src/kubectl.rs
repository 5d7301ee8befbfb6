//! The operator's `kubectl`, as a program.

use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, bail};
use clap::ValueEnum as _;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use towline_service::output::Format;

/// Largest part of kubectl's diagnostics in an error, in characters.
const DIAGNOSTICS: usize = 400;
/// Label of the agents' pods.
const AGENTS: &str = "app.kubernetes.io/name=towline-agent";

/// A kubectl with the flags that choose the cluster.
pub(super) struct Kubectl {
    flags: Vec<String>,
    namespace: String,
}

#[derive(Deserialize)]
struct List<T> {
    items: Vec<Item<T>>,
}

#[derive(Deserialize)]
struct Item<T> {
    status: Option<T>,
}

#[derive(Deserialize)]
struct Pods {
    items: Vec<Pod>,
}

#[derive(Deserialize)]
struct Pod {
    metadata: Metadata,
    status: Phase,
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
}

#[derive(Deserialize)]
struct Phase {
    #[serde(default)]
    phase: String,
}

impl Kubectl {
    pub(super) fn new(
        context: Option<String>,
        kubeconfig: Option<String>,
        namespace: String,
    ) -> Self {
        let context = context.map(|context| format!("--context={context}"));
        let kubeconfig = kubeconfig.map(|file| format!("--kubeconfig={file}"));
        Self { flags: context.into_iter().chain(kubeconfig).collect(), namespace }
    }

    /// Returns the status of every object of a kind.
    pub(super) fn list<T: DeserializeOwned>(&self, plural: &str) -> anyhow::Result<Vec<T>> {
        let kind = format!("{plural}.towline.io");
        let text = self.answer(&["get", &kind, "--output=json"]).with_context(|| {
            format!("cannot list {plural}: does `towline-controller publish` run for this cluster?")
        })?;
        let list: List<T> = serde_json::from_str(&text)
            .with_context(|| format!("kubectl printed no list of {plural}"))?;
        Ok(list.items.into_iter().filter_map(|item| item.status).collect())
    }

    /// Returns the name of the running agent pod on a node, if there is one.
    pub(super) fn agent(&self, node: &str) -> anyhow::Result<Option<String>> {
        let namespace = format!("--namespace={}", self.namespace);
        let labels = format!("--selector={AGENTS}");
        let on = format!("--field-selector=spec.nodeName={node}");
        let text = self
            .answer(&["get", "pods", &namespace, &labels, &on, "--output=json"])
            .with_context(|| format!("cannot find the agent pod on node {node}"))?;
        let pods: Pods = serde_json::from_str(&text).context("kubectl printed no list of pods")?;
        let running = pods.items.into_iter().find(|pod| pod.status.phase == "Running");
        Ok(running.map(|pod| pod.metadata.name))
    }

    /// Runs `towline` in a pod, with this process's output, and returns its exit status.
    pub(super) fn run(
        &self,
        pod: &str,
        command: &[&str],
        output: Format,
    ) -> anyhow::Result<ExitCode> {
        let namespace = format!("--namespace={}", self.namespace);
        let format = match output {
            Format::Table => None,
            Format::Wide | Format::Json | Format::Yaml => output.to_possible_value(),
        };
        let format = format.map(|format| format!("--output={}", format.get_name()));
        let mut words = command.iter();
        let status = self
            .command(&["exec", &namespace, "--container=agent", pod, "--", "/usr/bin/towline"])
            .args(words.next())
            .args(format)
            .args(words)
            .stdin(Stdio::null())
            .status()
            .context("cannot run kubectl")?;
        Ok(match status.code() {
            Some(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
            None => ExitCode::FAILURE,
        })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("kubectl");
        command.args(&self.flags).args(arguments);
        command
    }

    /// Returns what kubectl prints.
    fn answer(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let done = self
            .command(arguments)
            .stdin(Stdio::null())
            .output()
            .context("cannot run kubectl: is it in PATH?")?;
        if !done.status.success() {
            let told = String::from_utf8_lossy(&done.stderr);
            let line = told.trim().chars().map(|c| if c.is_control() { ' ' } else { c });
            bail!("{}", line.take(DIAGNOSTICS).collect::<String>());
        }
        String::from_utf8(done.stdout).context("kubectl printed no text")
    }
}
