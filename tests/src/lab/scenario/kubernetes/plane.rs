//! Kubernetes control plane: etcd and the API server on one host, and a client for it.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};

use super::programs::Programs;
use crate::cluster::{ClusterCa, kubeconfig, replace};
use crate::lab::interrupt::wait_for;
use crate::lab::process::{Daemon, Program};
use crate::lab::topology::Host;

/// Limit for the API server to start on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(120);
/// Limit for a request to the API server.
const REQUEST_LIMIT: Duration = Duration::from_secs(20);

/// Running etcd and API server.
pub(super) struct Plane {
    host: Arc<Host>,
    address: IpAddr,
    directory: PathBuf,
    programs: Programs,
    pub(super) ca: ClusterCa,
    _etcd: Daemon,
    apiserver: Option<Daemon>,
}

impl Plane {
    /// Starts etcd and the API server on `host`, and waits until the API server is ready. Clients
    /// use `address`.
    pub(super) fn start(
        host: &Arc<Host>,
        address: IpAddr,
        directory: &Path,
        programs: Programs,
    ) -> anyhow::Result<Self> {
        let directory = directory.join("plane");
        std::fs::create_dir(&directory)?;
        let ca = ClusterCa::new("kubernetes")?;
        replace(&directory.join("ca.crt"), ca.pem())?;
        let own = address.to_string();
        let names = [own.as_str(), "10.96.0.1", "127.0.0.1", "kubernetes.default.svc"];
        ca.issue("kube-apiserver", "", &names)?.write(&directory, "apiserver")?;
        ca.issue("service-accounts", "", &[])?.write(&directory, "sa")?;
        ca.issue("kube-apiserver-kubelet-client", "system:masters", &[])?
            .write(&directory, "kubelet-client")?;
        let etcd = Program::new(&programs.etcd)
            .arg("--data-dir")
            .arg(directory.join("etcd"))
            .args(["--listen-client-urls", "http://127.0.0.1:2379"])
            .args(["--advertise-client-urls", "http://127.0.0.1:2379"])
            .args(["--listen-peer-urls", "http://127.0.0.1:2380"])
            .start(host.namespace(), "etcd", &directory.join("etcd.log"))?;
        let mut plane = Self {
            host: Arc::clone(host),
            address,
            directory,
            programs,
            ca,
            _etcd: etcd,
            apiserver: None,
        };
        let admin = plane.ca.issue("admin", "system:masters", &[])?;
        plane.credentials(&plane.directory.clone(), "admin", &admin.both())?;
        plane.launch()?;
        plane.await_ready()?;
        Ok(plane)
    }

    /// Starts the API server. Does not wait until it is ready.
    pub(super) fn launch(&mut self) -> anyhow::Result<()> {
        let file = |name: &str| self.directory.join(name).display().to_string();
        let flags = [
            ("etcd-servers", "http://127.0.0.1:2379".to_owned()),
            ("secure-port", "6443".to_owned()),
            ("advertise-address", self.address.to_string()),
            ("authorization-mode", "Node,RBAC".to_owned()),
            ("enable-admission-plugins", "NodeRestriction".to_owned()),
            // The controller of service accounts does not run here, and the pods of the lab need no
            // account.
            ("disable-admission-plugins", "ServiceAccount".to_owned()),
            ("client-ca-file", file("ca.crt")),
            ("tls-cert-file", file("apiserver.crt")),
            ("tls-private-key-file", file("apiserver.key")),
            ("service-account-key-file", file("sa.crt")),
            ("service-account-signing-key-file", file("sa.key")),
            ("service-account-issuer", "https://kubernetes.default.svc".to_owned()),
            ("service-cluster-ip-range", "10.96.0.0/16".to_owned()),
            ("kubelet-certificate-authority", file("ca.crt")),
            ("kubelet-client-certificate", file("kubelet-client.crt")),
            ("kubelet-client-key", file("kubelet-client.key")),
            ("kubelet-preferred-address-types", "InternalIP".to_owned()),
            ("cert-dir", file("certs")),
        ];
        let program = Program::new(&self.programs.apiserver)
            .args(flags.map(|(name, value)| format!("--{name}={value}")));
        let log = self.directory.join("apiserver.log");
        self.apiserver = Some(program.start(self.host.namespace(), "kube-apiserver", &log)?);
        Ok(())
    }

    /// Waits until the API server is ready.
    pub(super) fn await_ready(&mut self) -> anyhow::Result<()> {
        wait_for("answer from the API server", START_LIMIT, || {
            if let Some(daemon) = &mut self.apiserver {
                daemon.check()?;
            }
            Ok(self
                .admin("GET", "/api/v1/namespaces/default", None)
                .ok()
                .filter(|(code, _)| *code == 200))
        })
        .map(drop)
    }

    /// Kills the API server.
    pub(super) fn stop(&mut self) -> anyhow::Result<()> {
        if let Some(mut daemon) = self.apiserver.take() {
            daemon.kill()?;
        }
        Ok(())
    }

    /// Writes a kubeconfig for this API server, and the client certificate to a file next to it.
    pub(super) fn credentials(
        &self,
        directory: &Path,
        name: &str,
        pem: &str,
    ) -> anyhow::Result<PathBuf> {
        let certificate = directory.join(format!("{name}.pem"));
        replace(&certificate, pem)?;
        let path = directory.join(format!("{name}.conf"));
        let server = format!("https://{}:6443", self.address);
        let text = kubeconfig(&server, &self.directory.join("ca.crt"), &certificate);
        replace(&path, &text)?;
        Ok(path)
    }

    /// Sends a request with the rights of an administrator, from the control plane's host.
    pub(super) fn admin(
        &self,
        method: &str,
        path: &str,
        body: Option<Value>,
    ) -> anyhow::Result<(u16, String)> {
        ask(&self.host, &self.directory.join("admin.conf"), method, path, body)
    }

    /// Creates a Node with this address and pod network. Replaces an existing Node of the same
    /// name.
    pub(super) fn node(&self, name: &str, ip: IpAddr, pods: &str) -> anyhow::Result<()> {
        self.admin("DELETE", &format!("/api/v1/nodes/{name}"), None)?;
        let node = json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name},
            "spec": {"podCIDR": pods, "podCIDRs": [pods]},
        });
        let (code, output) = self.admin("POST", "/api/v1/nodes", Some(node))?;
        anyhow::ensure!(code == 201, "cannot create the Node: {output}");
        let status = json!({"status": {
            "addresses": [{"type": "InternalIP", "address": ip.to_string()}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
            "conditions": [{"type": "Ready", "status": "True"}],
        }});
        let path = format!("/api/v1/nodes/{name}/status");
        let (code, output) = self.admin("PATCH", &path, Some(status))?;
        anyhow::ensure!(code == 200, "cannot set the status of the Node: {output}");
        Ok(())
    }

    /// Creates the objects of a file with YAML documents, as `kubectl create` does.
    pub(super) fn create_all(&self, file: &Path) -> anyhow::Result<()> {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read {}", file.display()))?;
        let admin = self.directory.join("admin.conf");
        for document in text.split("\n---\n") {
            let path = if document.contains("\nkind: ClusterRole\n") {
                "/apis/rbac.authorization.k8s.io/v1/clusterroles"
            } else {
                "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
            };
            let body = document.as_bytes().to_vec();
            let (code, answer) = send(&self.host, &admin, "POST", path, "application/yaml", body)?;
            anyhow::ensure!(code == 201, "cannot create an object of {}: {answer}", file.display());
        }
        Ok(())
    }

    /// Runs kubectl with the rights of an administrator. Returns `None` if it is not installed.
    pub(super) fn kubectl(&self, arguments: &[&str]) -> Option<anyhow::Result<String>> {
        let program = Program::new(self.programs.kubectl.as_ref()?)
            .arg("--kubeconfig")
            .arg(self.directory.join("admin.conf"))
            .args(arguments.iter().copied());
        Some(program.run_ok(self.host.namespace(), REQUEST_LIMIT))
    }
}

/// Sends a request from a host with a kubeconfig. Returns the status code and the body.
pub(super) fn ask(
    host: &Host,
    kubeconfig: &Path,
    method: &str,
    path: &str,
    body: Option<Value>,
) -> anyhow::Result<(u16, String)> {
    let merge = method == "PATCH";
    let kind = if merge { "application/merge-patch+json" } else { "application/json" };
    let body = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
    send(host, kubeconfig, method, path, kind, body)
}

/// Sends a request with a body of this content type.
fn send(
    host: &Host,
    kubeconfig: &Path,
    method: &str,
    path: &str,
    kind: &str,
    body: Vec<u8>,
) -> anyhow::Result<(u16, String)> {
    host.namespace().run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let _ = rustls::crypto::ring::default_provider().install_default();
            let config = kube::Config::from_custom_kubeconfig(
                Kubeconfig::read_from(kubeconfig)?,
                &KubeConfigOptions::default(),
            )
            .await?;
            let client = kube::Client::try_from(config)?;
            let request = http::Request::builder()
                .method(method)
                .uri(path)
                .header("content-type", kind)
                .body(body)?;
            let answer = tokio::time::timeout(REQUEST_LIMIT, client.request_text(request))
                .await
                .context("the API server does not answer")?;
            match answer {
                // The client only reports success: a created object has status code 201.
                Ok(text) => Ok((if method == "POST" { 201 } else { 200 }, text)),
                Err(kube::Error::Api(status)) => Ok((status.code, status.message)),
                Err(error) => Err(error.into()),
            }
        })
    })
}
