//! Credentials of the kubelet: their path, their node, and whether they changed.

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

use super::client_error::api_error;
use super::files::{self, Fingerprint};

/// Prefix of the user name in every kubelet's certificate.
const NODE_USER: &str = "system:node:";
/// Maximum time for an exec plugin.
const PLUGIN_LIMIT: Duration = Duration::from_secs(30);
/// Maximum time to open a connection to the API server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum time without data on a watch. It is longer than the server's timeout of a watch.
const READ_TIMEOUT: Duration = Duration::from_secs(75);

/// API client with the kubelet's permissions.
pub(super) struct Credentials {
    /// Path of the kubeconfig.
    pub(super) path: PathBuf,
    /// Address of the API server.
    pub(super) server: String,
    /// Name of the Node that the credentials belong to.
    pub(super) node: String,
    pub(super) client: Client,
    files: Fingerprint,
}

/// Returns the path of the kubeconfig: the configured one, or else the first usual one that exists.
pub(super) fn find(configured: Option<&Path>) -> Option<PathBuf> {
    let usual = Installation::ALL.map(|installation| Path::new(installation.files()[0]));
    let places = match configured {
        Some(path) => vec![path],
        None => usual.to_vec(),
    };
    let closed = |path: &&&Path| path.metadata().is_err_and(|error| files::is_denied(&error));
    // A kubeconfig may exist in a directory that only the helper can access.
    let found = places.iter().find(|path| path.exists()).or_else(|| places.iter().find(closed));
    found.map(|path| (*path).to_owned())
}

impl Credentials {
    /// Reads the credentials and determines their node.
    pub(super) async fn load(path: &Path) -> anyhow::Result<Self> {
        let mut kubeconfig = read(path).await?;
        // The marks are read before the contents, so that a change in between is detected.
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
        // This fails if a provider is installed already, which is fine.
        let _ = rustls::crypto::ring::default_provider().install_default();
        // This may run an exec plugin.
        let built = tokio::task::spawn_blocking(move || Client::try_from(config));
        let client = tokio::time::timeout(PLUGIN_LIMIT, built)
            .await
            .with_context(|| format!("the exec plugin of {} hangs", path.display()))??
            .with_context(|| format!("{} cannot be used", path.display()))?;
        let user = match name {
            Some(name) => name?,
            // Only the API server knows the user of a token or of an exec plugin.
            None => who_am_i(&client).await?,
        };
        let Some(node) = user.strip_prefix(NODE_USER).filter(|node| !node.is_empty()) else {
            bail!(
                "{} is of `{user}`, not of a node: use the kubelet's own kubeconfig",
                path.display()
            );
        };
        Ok(Self { path: path.to_owned(), server, node: node.to_owned(), client, files })
    }

    /// Returns whether the files have changed.
    pub(super) async fn changed(&self) -> bool {
        self.files.changed().await
    }
}

/// Reads a kubeconfig, through the helper if the agent has no access.
async fn read(path: &Path) -> anyhow::Result<Kubeconfig> {
    let context = || format!("{} is not a kubeconfig", path.display());
    match std::fs::File::open(path) {
        Err(error) if files::is_denied(&error) => {}
        _ => return Kubeconfig::read_from(path).with_context(context),
    }
    let bytes = files::read(path).await;
    let bytes = bytes.with_context(|| format!("cannot read {}", path.display()))?;
    let mut kubeconfig =
        Kubeconfig::from_yaml(&String::from_utf8_lossy(&bytes)).with_context(context)?;
    // kube does this for a kubeconfig that it reads itself.
    for file in named_files(&mut kubeconfig) {
        let absolute = path.parent().map(|directory| directory.join(&*file));
        if let Some(absolute) = absolute {
            *file = absolute.to_string_lossy().into_owned();
        }
    }
    Ok(kubeconfig)
}

/// Returns every file name in a kubeconfig.
fn named_files(kubeconfig: &mut Kubeconfig) -> impl Iterator<Item = &mut String> {
    let clusters = kubeconfig.clusters.iter_mut().filter_map(|named| named.cluster.as_mut());
    let users = kubeconfig.auth_infos.iter_mut().filter_map(|named| named.auth_info.as_mut());
    let of_clusters = clusters.map(|cluster| &mut cluster.certificate_authority);
    let of_users = users.flat_map(|user| {
        [&mut user.client_certificate, &mut user.client_key, &mut user.token_file]
    });
    of_clusters.chain(of_users).flatten()
}

/// Embeds the contents of files that only the helper can open into the kubeconfig. kube reads files
/// itself and could not open them.
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

/// Returns the content, in base64, of a file that only the helper can open.
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

/// Returns the kubeconfig and every file that it names.
fn referenced(path: &Path, kubeconfig: &Kubeconfig) -> Vec<PathBuf> {
    let clusters = kubeconfig.clusters.iter().filter_map(|named| named.cluster.as_ref());
    let users = kubeconfig.auth_infos.iter().filter_map(|named| named.auth_info.as_ref());
    let named = clusters.map(|cluster| &cluster.certificate_authority).chain(
        users.flat_map(|user| [&user.client_certificate, &user.client_key, &user.token_file]),
    );
    std::iter::once(path.to_owned()).chain(named.flatten().map(PathBuf::from)).collect()
}

/// Returns the client certificate of the current context's user, if it has one.
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

/// Asks the API server for the user name of the credentials.
async fn who_am_i(client: &Client) -> anyhow::Result<String> {
    let api: Api<SelfSubjectReview> = Api::all(client.clone());
    let review = api
        .create(&PostParams::default(), &SelfSubjectReview::default())
        .await
        .map_err(|error| api_error(&error))?;
    let user = review.status.and_then(|status| status.user_info?.username);
    user.context("the API server returned no user name for these credentials")
}
