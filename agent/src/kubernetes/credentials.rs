//! The kubelet's own credentials: where they are, whose they are, whether they changed.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use kube::api::PostParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

/// Where kubeadm and k3s put the kubelet's kubeconfig.
const KUBECONFIGS: [&str; 2] =
    ["/etc/kubernetes/kubelet.conf", "/var/lib/rancher/k3s/agent/kubelet.kubeconfig"];
/// Of the user name in every kubelet's certificate.
const NODE_USER: &str = "system:node:";
/// An exec plugin that takes longer hangs.
const PLUGIN_LIMIT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A watch that says nothing for this long is dead; the server ends one sooner.
const READ_TIMEOUT: Duration = Duration::from_secs(75);

/// A client with the kubelet's rights.
pub(super) struct Credentials {
    /// The kubeconfig.
    pub(super) path: PathBuf,
    /// The API server's address.
    pub(super) server: String,
    /// The name of the Node that they are of.
    pub(super) node: String,
    pub(super) client: Client,
    files: Fingerprint,
}

/// What tells a file from the one that was there before. Kubelets rotate by a new link or file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Fingerprint(Vec<(PathBuf, Option<[i128; 4]>)>);

/// The kubeconfig: the configured one, else the first of the usual ones that is there.
pub(super) fn find(configured: Option<&Path>) -> Option<PathBuf> {
    let usual = KUBECONFIGS.map(Path::new);
    let places = match configured {
        Some(path) => vec![path],
        None => usual.to_vec(),
    };
    places.into_iter().find(|path| path.exists()).map(Path::to_owned)
}

impl Fingerprint {
    /// Of the kubeconfig alone: for one that could not be read.
    pub(super) fn of(path: &Path) -> Self {
        Self::of_files(vec![path.to_owned()])
    }

    fn of_files(paths: Vec<PathBuf>) -> Self {
        let mark = |path: &Path| {
            let data = std::fs::metadata(path).ok()?;
            let time = i128::from(data.mtime()) * 1_000_000_000 + i128::from(data.mtime_nsec());
            Some([data.dev().into(), data.ino().into(), time, data.size().into()])
        };
        Self(paths.into_iter().map(|path| (path.clone(), mark(&path))).collect())
    }

    /// Whether the files are others now.
    pub(super) fn changed(&self) -> bool {
        *self != Self::of_files(self.0.iter().map(|(path, _)| path.clone()).collect())
    }
}

impl Credentials {
    /// Reads them and finds out whose they are.
    pub(super) async fn load(path: &Path) -> anyhow::Result<Self> {
        let kubeconfig = Kubeconfig::read_from(path)
            .with_context(|| format!("{} is no kubeconfig", path.display()))?;
        // Before the contents are read: a change in between is seen as one.
        let files = Fingerprint::of_files(referenced(path, &kubeconfig));
        let name = certificate(&kubeconfig)?.map(|certificate| common_name(&certificate));
        let mut config =
            kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                .await
                .with_context(|| format!("{} cannot be used", path.display()))?;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        config.read_timeout = Some(READ_TIMEOUT);
        let server = config.cluster_url.to_string();
        // Fails when it was done before, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        // An exec plugin runs in here.
        let built = tokio::task::spawn_blocking(move || Client::try_from(config));
        let client = tokio::time::timeout(PLUGIN_LIMIT, built)
            .await
            .with_context(|| format!("the exec plugin of {} hangs", path.display()))??
            .with_context(|| format!("{} cannot be used", path.display()))?;
        let user = match name {
            Some(name) => name?,
            // A token or an exec plugin: only the API server knows whose.
            None => who_am_i(&client).await?,
        };
        let Some(node) = user.strip_prefix(NODE_USER).filter(|node| !node.is_empty()) else {
            bail!("{} is of `{user}`, not of a node: a kubelet's own is needed", path.display());
        };
        Ok(Self { path: path.to_owned(), server, node: node.to_owned(), client, files })
    }

    /// Whether the files are others now.
    pub(super) fn changed(&self) -> bool {
        self.files.changed()
    }
}

/// The kubeconfig and every file that it names.
fn referenced(path: &Path, kubeconfig: &Kubeconfig) -> Vec<PathBuf> {
    let clusters = kubeconfig.clusters.iter().filter_map(|named| named.cluster.as_ref());
    let users = kubeconfig.auth_infos.iter().filter_map(|named| named.auth_info.as_ref());
    let named = clusters.map(|cluster| &cluster.certificate_authority).chain(
        users.flat_map(|user| [&user.client_certificate, &user.client_key, &user.token_file]),
    );
    std::iter::once(path.to_owned()).chain(named.flatten().map(PathBuf::from)).collect()
}

/// The client certificate of the current context's user, if it has one.
fn certificate(kubeconfig: &Kubeconfig) -> anyhow::Result<Option<CertificateDer<'static>>> {
    let context = kubeconfig.current_context.as_deref();
    let user = kubeconfig
        .contexts
        .iter()
        .find(|named| context.is_none_or(|context| named.name == context))
        .and_then(|named| named.context.as_ref()?.user.as_deref());
    let Some(user) = kubeconfig
        .auth_infos
        .iter()
        .find(|named| user.is_none_or(|user| named.name == user))
        .and_then(|named| named.auth_info.as_ref())
    else {
        return Ok(None);
    };
    let pem = match (&user.client_certificate_data, &user.client_certificate) {
        (Some(data), _) => data_encoding::BASE64
            .decode(data.as_bytes())
            .context("client-certificate-data is not base64")?,
        (None, Some(file)) => std::fs::read(file).with_context(|| format!("cannot read {file}"))?,
        (None, None) => return Ok(None),
    };
    let certificate = CertificateDer::from_pem_slice(&pem);
    Ok(Some(certificate.ok().context("the client certificate is not PEM")?))
}

fn common_name(certificate: &CertificateDer<'_>) -> anyhow::Result<String> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate)
        .ok()
        .context("the client certificate cannot be parsed")?;
    let name = parsed.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    Ok(name.context("the client certificate has no common name")?.to_owned())
}

async fn who_am_i(client: &Client) -> anyhow::Result<String> {
    let api: Api<SelfSubjectReview> = Api::all(client.clone());
    let review = api
        .create(&PostParams::default(), &SelfSubjectReview::default())
        .await
        .map_err(|error| anyhow::anyhow!(super::own_node::said(&error)))?;
    let user = review.status.and_then(|status| status.user_info?.username);
    user.context("the API server does not say whose credentials these are")
}
