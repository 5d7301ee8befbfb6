//! Credentials of a Kubernetes cluster that tests need: a certificate authority, certificates of
//! components, and kubeconfigs.

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use towline_service::pem;

/// A cluster's certificate authority.
#[derive(Debug)]
pub struct ClusterCa {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate and its private key, as PEM.
#[derive(Debug, Clone)]
pub struct Pair {
    /// The certificate, in PEM.
    pub certificate: String,
    /// The private key, in PEM (PKCS #8).
    pub key: String,
}

impl ClusterCa {
    /// Generates a CA with the common name `name`.
    pub fn new(name: &str) -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let pem = pem::certificate(params.self_signed(&key)?.der());
        Ok(Self { issuer: Issuer::new(params, key), pem })
    }

    /// Returns the CA's certificate, in PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Returns the CA's private key, in PEM (PKCS #8): a cluster's controller manager signs with it.
    pub fn key_pem(&self) -> String {
        pem::private_key(self.issuer.key().serialized_der()).to_string()
    }

    /// Issues a client certificate of `user` in `group`. With `names` it is a server certificate
    /// too. It is valid for one day, beginning an hour ago.
    pub fn issue(&self, user: &str, group: &str, names: &[&str]) -> anyhow::Result<Pair> {
        let from = SystemTime::now() - Duration::from_secs(3_600);
        self.issue_from(from, user, group, names)
    }

    /// Issues the same certificate as [`Self::issue`], valid for one day from `from`.
    pub fn issue_from(
        &self,
        from: SystemTime,
        user: &str,
        group: &str,
        names: &[&str],
    ) -> anyhow::Result<Pair> {
        let key = KeyPair::generate()?;
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, user);
        if !group.is_empty() {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.not_before = from.into();
        params.not_after = (from + Duration::from_secs(86_400)).into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = pem::certificate(params.signed_by(&key, &self.issuer)?.der());
        let key = pem::private_key(key.serialized_der()).to_string();
        Ok(Pair { certificate, key })
    }

    /// Issues a client certificate that the node authorizer accepts as that of the node `name`.
    pub fn issue_node(&self, name: &str) -> anyhow::Result<Pair> {
        self.issue(&format!("system:node:{name}"), "system:nodes", &[])
    }
}

impl Pair {
    /// Returns certificate and key in one file, as kubelets store them.
    pub fn both(&self) -> String {
        format!("{}{}", self.certificate, self.key)
    }

    /// Returns certificate and key as a credential plugin prints them.
    pub fn of_plugin(&self) -> String {
        serde_json::json!({
            "apiVersion": PLUGIN_API,
            "kind": "ExecCredential",
            "status": {"clientCertificateData": self.certificate, "clientKeyData": self.key},
        })
        .to_string()
    }

    /// Writes `NAME.crt` and `NAME.key` into a directory.
    pub fn write(&self, directory: &Path, name: &str) -> anyhow::Result<()> {
        for (suffix, text) in [("crt", &self.certificate), ("key", &self.key)] {
            replace(&directory.join(format!("{name}.{suffix}")), text)?;
        }
        Ok(())
    }
}

/// Returns a kubeconfig in kubeadm's form: the certificate and its key are in a separate file,
/// `credentials`.
pub fn kubeconfig(server: &str, ca: &Path, credentials: &Path) -> String {
    let user = serde_json::json!({"client-certificate": credentials, "client-key": credentials});
    kubeconfig_of(server, ca, &user)
}

/// Returns a kubeconfig that gets its credentials from a plugin: `command` is the program and its
/// arguments.
pub fn kubeconfig_of_plugin(server: &str, ca: &Path, command: &[&str]) -> String {
    let (program, arguments) = command.split_first().unwrap_or((&"", &[]));
    let exec = serde_json::json!({
        "apiVersion": PLUGIN_API,
        "command": program,
        "args": arguments,
        "interactiveMode": "Never",
    });
    kubeconfig_of(server, ca, &serde_json::json!({"exec": exec}))
}

/// Returns a kubeconfig of this user, as JSON, which is valid YAML.
fn kubeconfig_of(server: &str, ca: &Path, user: &serde_json::Value) -> String {
    serde_json::json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{
            "name": "lab",
            "cluster": {"server": server, "certificate-authority": ca},
        }],
        "users": [{"name": "node", "user": user}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "node"}}],
        "current-context": "lab",
    })
    .to_string()
}

const PLUGIN_API: &str = "client.authentication.k8s.io/v1";

/// Replaces a file atomically.
pub fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let beside = path.with_extension("new");
    std::fs::write(&beside, text)
        .and_then(|()| std::fs::rename(&beside, path))
        .with_context(|| format!("cannot write {}", path.display()))
}
