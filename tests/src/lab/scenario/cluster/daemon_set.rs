//! The agent in a pod of the chart's DaemonSet, on a worker that reaches the API server without the mesh.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use super::machine::{Layout, Machine, pod};
use super::plane::{PODS, Plane};
use super::programs::Programs;
use super::{Checks, Form};
use crate::checkout;
use crate::lab::interrupt::sleep;
use crate::lab::mesh::{Node, Operator};
use crate::lab::namespace::Namespace;

/// Name and addresses on the internet of the worker.
pub(super) const WORKER: (&str, &str, &str) = ("worker-c", "203.0.113.30", "2001:db8::30");
/// Limit for a change that takes Kubernetes a few seconds.
const LIMIT: Duration = Duration::from_secs(60);
/// Namespace of the manifests in `deploy/kubernetes`.
const NAMESPACE: &str = "towline";
/// Lifetime of the kubelet's certificate, in the forms of Kubernetes and of the lab. The kubelet gets another one after
/// 36 s to 132 s.
const LIFETIME: (&str, Duration) = ("3m", Duration::from_secs(180));

/// What the checks use of the cluster.
pub(super) struct Stage<'a> {
    pub(super) programs: &'a Programs,
    pub(super) plane: &'a mut Plane,
    /// Operator of the mesh's controller.
    pub(super) operator: &'a Operator,
    /// The worker, which has not joined the mesh.
    pub(super) node: Node,
    /// Images of the pods.
    pub(super) images: &'a [PathBuf],
    /// Directory of the lab.
    pub(super) directory: &'a Path,
    /// Connection from the host of another worker to the pod `echo-b` of a third one.
    pub(super) connection: TcpStream,
    pub(super) form: Form,
}

/// Joins the worker to the cluster, runs the agent there in a pod, and updates it.
pub(super) fn play(stage: Stage<'_>, checks: &mut Checks<'_>) -> anyhow::Result<()> {
    let Stage { programs, plane, operator, node, images, directory, mut connection, form } = stage;
    let image = programs.agent.as_ref().context("the image of the agent was not built")?;
    let name = node.name().to_owned();
    plane.sign_for(LIFETIME.0, programs)?;
    let images = [images, &image.archives[..]].concat();
    let mut machine = Machine::start(node, Layout::Kubeadm, directory, programs, &images)?;
    machine.join(plane, programs)?;
    let mut pods: Vec<String> = Vec::new();
    let label = format!("{name} registers without the mesh");
    let registered = checks.check(&label, LIMIT, || {
        machine.check()?;
        let path = "jsonpath={.spec.podCIDRs}";
        let found = plane.kubectl(programs, &["get", "node", &name, "-o", path])?;
        pods = serde_json::from_str(&found).context("it has no pod networks yet")?;
        Ok(pods.len() == 1)
    })?;
    ensure!(registered, "{name} did not register");
    let issued = Instant::now();
    let first = machine.certificate()?;
    machine.start_proxy(plane, programs, form.proxy.name())?;
    machine.write_cni(&pods)?;
    let ready = checks.check(&format!("{name} is ready"), LIMIT, || {
        let path = "jsonpath={.status.conditions[?(@.type==\"Ready\")].status}";
        Ok(plane.kubectl(programs, &["get", "node", &name, "-o", path])? == "True")
    })?;
    ensure!(ready, "{name} is not ready");

    install(plane, programs, operator, &name)?;
    let ready = checks.check("the agent's pod is ready", 2 * LIMIT, || {
        let agent = agent(plane, programs)?;
        Ok(is_ready(&agent))
    })?;
    ensure!(ready, "the agent's pod is not ready");
    let echo = pod("echo-d", &name, &["serve", "echo-d"]);
    plane.apply(programs, &echo)?;
    let label = format!("pod echo-b to a pod of {name}, through the agent in a pod");
    checks.check(&label, 2 * LIMIT, || crosses(plane, programs))?;

    checks.check("the kubelet gets another certificate", LIFETIME.1, || {
        Ok(machine.certificate()? != first)
    })?;
    // From now on, the API server accepts the first certificate no longer.
    sleep((LIFETIME.1 + Duration::from_secs(5)).saturating_sub(issued.elapsed()))?;
    plane.reconnect(programs)?;
    checks.check("the agent in a pod uses the new certificate", 2 * LIMIT, || {
        let agent = agent(plane, programs)?;
        let pod = agent["metadata"]["name"].as_str().context("the agent's pod has no name")?;
        let exec = ["exec", "-n", NAMESPACE, pod, "-c", "agent", "--", "/usr/bin/towline"];
        let status = plane.kubectl(programs, &[&exec[..], &["status", "-o", "json"]].concat())?;
        let status: Value = serde_json::from_str(&status)?;
        let kubernetes = &status["kubernetes"];
        Ok(kubernetes["connected"] == true && kubernetes["node"] == *name)
    })?;

    let every = format!("*={}", image.digest_name);
    let update = ["set", "image", "daemonset/towline-agent", "-n", NAMESPACE, &every];
    plane.kubectl(programs, &update)?;
    let mut lost = None;
    checks.check("the agent's pod is updated to an image by digest", 2 * LIMIT, || {
        if lost.is_none() {
            lost = ask(&mut connection).err();
        }
        let agent = agent(plane, programs)?;
        let image_now = &agent["spec"]["containers"][0]["image"];
        Ok(*image_now == *image.digest_name && is_ready(&agent))
    })?;
    checks.check("a connection of two other nodes outlives the update", Duration::ZERO, || {
        match lost.take() {
            None => ask(&mut connection).map(|()| true),
            Some(error) => Err(error),
        }
    })?;
    let label = format!("pod echo-b to a pod of {name} after the update");
    checks.check(&label, LIMIT, || crosses(plane, programs))?;
    Ok(())
}

/// Returns whether the pod `echo-b` gets an answer of the pod `echo-d`.
fn crosses(plane: &Plane, programs: &Programs) -> anyhow::Result<bool> {
    let path = "jsonpath={.status.podIP}";
    let address = plane.kubectl(programs, &["get", "pod", "echo-d", "-o", path])?;
    let url = format!("http://{address}:8080/");
    let get = ["exec", "echo-b", "--", "/usr/bin/testpod", "get", &url, "text"];
    Ok(plane.kubectl(programs, &get)? == "echo-d\ntext")
}

/// Creates the DaemonSet of `deploy/kubernetes`, which is the chart with its default values, for one worker, and the
/// token that it joins with.
fn install(
    plane: &Plane,
    programs: &Programs,
    operator: &Operator,
    worker: &str,
) -> anyhow::Result<()> {
    let token = operator.token_with(&["--uses", "50", "--ttl", "2h", "--pod-range", PODS])?;
    plane.apply(
        programs,
        &json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": "towline-join", "namespace": NAMESPACE},
                "stringData": {"token": token.token},
            },
        ]}),
    )?;
    let path = checkout::root().join("deploy/kubernetes/agent.yaml");
    let manifest = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    plane.apply_text(programs, &selecting(&manifest, worker)?)
}

/// Returns the manifest for one worker alone, as the chart's `agent.nodeSelector` makes it: on the others, the agent
/// runs outside of pods.
fn selecting(manifest: &str, worker: &str) -> anyhow::Result<String> {
    const ALL: &str = "\n      nodeSelector: {}\n";
    ensure!(manifest.matches(ALL).count() == 1, "the manifest has not one selector of all nodes");
    let one = format!("\n      nodeSelector: {{kubernetes.io/hostname: {worker}}}\n");
    Ok(manifest.replacen(ALL, &one, 1))
}

/// Returns the agent's pod. During an update there may be none, or two.
fn agent(plane: &Plane, programs: &Programs) -> anyhow::Result<Value> {
    let label = "app.kubernetes.io/name=towline-agent";
    let list =
        plane.kubectl(programs, &["get", "pods", "-n", NAMESPACE, "-l", label, "-o", "json"])?;
    let mut list: Value = serde_json::from_str(&list)?;
    let items = list["items"].as_array_mut().context("kubectl printed no list")?;
    ensure!(items.len() == 1, "there are {} pods of the agent", items.len());
    Ok(items.remove(0))
}

fn is_ready(pod: &Value) -> bool {
    let mut conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
    conditions.any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

/// Connects from a host to the pod `echo-b`.
pub(super) fn connect(from: &Namespace, to: SocketAddr) -> anyhow::Result<TcpStream> {
    const TIMEOUT: Duration = Duration::from_secs(10);
    from.run(|| {
        let stream = TcpStream::connect_timeout(&to, TIMEOUT)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        Ok(stream)
    })
}

/// Sends a request to the pod `echo-b`, and waits for the answer. The connection stays open.
fn ask(connection: &mut TcpStream) -> anyhow::Result<()> {
    connection.write_all(b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n")?;
    let (mut answer, mut chunk) = (Vec::new(), [0; 1024]);
    while !answer.ends_with(b"echo-b\n") {
        let length = connection.read(&mut chunk)?;
        ensure!(length > 0, "the connection was closed");
        answer.extend_from_slice(&chunk[..length]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_of_the_chart_can_be_limited_to_one_worker() {
        let path = checkout::root().join("deploy/kubernetes/agent.yaml");
        let manifest = std::fs::read_to_string(path).expect("the manifest");
        let selecting = selecting(&manifest, "worker-c").expect("one pod");
        let (all, one) = ("nodeSelector: {}", "nodeSelector: {kubernetes.io/hostname: worker-c}");
        assert_eq!(selecting.replace(one, all), manifest);
        assert_eq!(selecting.matches(one).count(), 1);
    }
}
