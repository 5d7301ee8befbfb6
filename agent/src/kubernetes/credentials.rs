//! The kubelet's own credentials: where they are, whose they are, whether they changed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use kube::api::PostParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use towline_helper::protocol::Installation;

use super::files::{self, Fingerprint};

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

/// The kubeconfig: the configured one, else the first of the usual ones that is there.
pub(super) fn find(configured: Option<&Path>) -> Option<PathBuf> {
    let usual = Installation::ALL.map(|installation| Path::new(installation.files()[0]));
    let places = match configured {
        Some(path) => vec![path],
        None => usual.to_vec(),
    };
    let closed = |path: &&&Path| path.metadata().is_err_and(|error| files::is_denied(&error));
    // A directory that is closed to us may hold it.
    let found = places.iter().find(|path| path.exists()).or_else(|| places.iter().find(closed));
    found.map(|path| (*path).to_owned())
}

impl Credentials {
    /// Reads them and finds out whose they are.
    pub(super) async fn load(path: &Path) -> anyhow::Result<Self> {
        let mut kubeconfig = read(path).await?;
        // Before the contents are read: a change in between is seen as one.
        let files = Fingerprint::of(referenced(path, &kubeconfig)).await;
        take_in(&mut kubeconfig).await?;
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
    pub(super) async fn changed(&self) -> bool {
        self.files.changed().await
    }
}

/// Reads a kubeconfig; through the helper if it is closed to us.
async fn read(path: &Path) -> anyhow::Result<Kubeconfig> {
    let context = || format!("{} is no kubeconfig", path.display());
    match std::fs::File::open(path) {
        Err(error) if files::is_denied(&error) => {}
        _ => return Kubeconfig::read_from(path).with_context(context),
    }
    let bytes = files::read(path).await;
    let bytes = bytes.with_context(|| format!("cannot read {}", path.display()))?;
    let mut kubeconfig =
        Kubeconfig::from_yaml(&String::from_utf8_lossy(&bytes)).with_context(context)?;
    // As kube does for one that it reads itself.
    for file in named_files(&mut kubeconfig) {
        let absolute = path.parent().map(|directory| directory.join(&*file));
        if let Some(absolute) = absolute {
            *file = absolute.to_string_lossy().into_owned();
        }
    }
    Ok(kubeconfig)
}

/// Every file that a kubeconfig names.
fn named_files(kubeconfig: &mut Kubeconfig) -> impl Iterator<Item = &mut String> {
    let clusters = kubeconfig.clusters.iter_mut().filter_map(|named| named.cluster.as_mut());
    let users = kubeconfig.auth_infos.iter_mut().filter_map(|named| named.auth_info.as_mut());
    let of_clusters = clusters.map(|cluster| &mut cluster.certificate_authority);
    let of_users = users.flat_map(|user| {
        [&mut user.client_certificate, &mut user.client_key, &mut user.token_file]
    });
    of_clusters.chain(of_users).flatten()
}

/// Takes the contents of files that are closed to us into the kubeconfig, where kube, which reads
/// files itself, finds them.
async fn take_in(kubeconfig: &mut Kubeconfig) -> anyhow::Result<()> {
    for cluster in kubeconfig.clusters.iter_mut().filter_map(|named| named.cluster.as_mut()) {
        if let Some(data) = closed(cluster.certificate_authority.as_deref()).await? {
            cluster.certificate_authority_data = Some(data);
            cluster.certificate_authority = None;
        }
    }
    for user in kubeconfig.auth_infos.iter_mut().filter_map(|named| named.auth_info.as_mut()) {
        if let Some(data) = closed(user.client_certificate.as_deref()).await? {
            user.client_certificate_data = Some(data);
            user.client_certificate = None;
        }
        if let Some(data) = closed(user.client_key.as_deref()).await? {
            user.client_key_data = Some(data.into());
            user.client_key = None;
        }
    }
    Ok(())
}

/// The content, in base64, of a file that is there and closed to us.
async fn closed(path: Option<&str>) -> anyhow::Result<Option<String>> {
    let Some(path) = path.map(Path::new) else { return Ok(None) };
    match std::fs::File::open(path) {
        Err(error) if files::is_denied(&error) => {}
        _ => return Ok(None),
    }
    let bytes = files::read(path).await;
    let bytes = bytes.with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Some(data_encoding::BASE64.encode(&bytes)))
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
