//! Command `towline-controller admin`.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Subcommand;
use serde::Serialize;
use towline_proto::id::IdentityKey;
use towline_proto::pb;
use towline_service::output::{self, Format};
use towline_service::pem;

use super::client::{Client, status_error};
use super::{Common, examples, span};
use crate::authority;
use crate::clock;
use crate::state_dir::StateDir;

#[derive(Debug, Subcommand)]
pub(super) enum Admin {
    /// List the keys of administrators, including those that were revoked in the last 30 days
    #[command(after_help = examples::ADMIN_LIST)]
    List {
        /// Output format
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Create a credential for administration from another machine, or renew one
    #[command(after_help = examples::ADMIN_CREATE)]
    Create {
        /// Name of the administrator: lower-case letters, digits and hyphens
        name: String,
        /// Directory of the credential, which is created; a key that is there is used again
        #[arg(long, value_name = "DIR")]
        directory: PathBuf,
    },
    /// Revoke keys of administrators; the controller replaces its own at once
    #[command(after_help = examples::ADMIN_REVOKE)]
    Revoke {
        /// Key in 64 hexadecimal digits, or a name, for all of its keys
        #[arg(value_name = "KEY|NAME")]
        admin: String,
    },
}

pub(super) async fn run(command: Admin, common: &Common) -> anyhow::Result<()> {
    let mut client = common.connect().await?;
    match command {
        Admin::List { output } => {
            let admins = list(&mut client).await?;
            Ok(output::write(output, &admins, |_| table(&admins))?)
        }
        Admin::Create { name, directory } => {
            create(&mut client, &common.settings()?.state_dir(), name, &directory).await
        }
        Admin::Revoke { admin } => {
            let keys = match admin.parse::<IdentityKey>() {
                Ok(key) => vec![key],
                Err(_) => keys_of(&mut client, &admin).await?,
            };
            for key in keys {
                let request = pb::RevokeAdminRequest { key: key.0.to_vec() };
                client.admin.revoke_admin(request).await.map_err(status_error)?;
                eprintln!("administrator's key {key} revoked");
            }
            Ok(())
        }
    }
}

/// Writes a credential into a directory: the key of the administrator, its certificate, and that of the CA.
async fn create(
    client: &mut Client,
    state_dir: &Path,
    name: String,
    directory: &Path,
) -> anyhow::Result<()> {
    let shown = directory.display();
    if directory.join("ca.key").exists() {
        bail!("{shown} is the state directory of a controller: give the credential its own");
    }
    let ca = StateDir::new(state_dir).read("ca.crt")?;
    let ca = ca.with_context(|| format!("ca.crt is missing in {}", state_dir.display()))?;
    let dir = StateDir::new(directory);
    let csr = authority::admin_request(&dir)?;
    let request = pb::CreateAdminRequest { name, csr };
    let created = client.admin.create_admin(request).await.map_err(status_error)?.into_inner();
    dir.write("admin.crt", 0o600, &pem::certificate(&created.certificate))?;
    dir.write("ca.crt", 0o644, &ca)?;
    let left = span(created.expires_at - clock::now().unix);
    eprintln!(
        "credential written to {shown}, valid for {left}: use it with --state-dir and --controller"
    );
    Ok(())
}

/// Returns the valid keys of the administrator with this name.
async fn keys_of(client: &mut Client, name: &str) -> anyhow::Result<Vec<IdentityKey>> {
    let admins = list(client).await?;
    let valid = admins.iter().filter(|admin| admin.name == name && admin.revoked_at.is_none());
    let keys: Vec<IdentityKey> = valid.map(|admin| admin.key).collect();
    if keys.is_empty() {
        bail!("no administrator `{name}` has a valid key: see `towline-controller admin list`");
    }
    Ok(keys)
}

async fn list(client: &mut Client) -> anyhow::Result<Vec<View>> {
    let answer = client.admin.list_admins(pb::ListAdminsRequest {}).await.map_err(status_error)?;
    answer.into_inner().admins.into_iter().map(View::read).collect()
}

/// Key of an administrator.
#[derive(Debug, Serialize)]
struct View {
    /// Name of the administrator; `local` for the credential in the controller's state directory.
    name: String,
    /// Public key of the administrator's certificates.
    key: IdentityKey,
    /// `valid` or `revoked`.
    state: &'static str,
    /// Time at which the key was added.
    created_at: Option<String>,
    /// Time at which the key was revoked; `null` while it is valid.
    revoked_at: Option<String>,
}

impl View {
    fn read(info: pb::AdminInfo) -> anyhow::Result<Self> {
        Ok(Self {
            name: info.name,
            key: IdentityKey::try_from(info.key.as_slice())?,
            state: if info.revoked_at.is_some() { "revoked" } else { "valid" },
            created_at: output::time(info.created_at),
            revoked_at: info.revoked_at.and_then(output::time),
        })
    }
}

fn table(admins: &[View]) -> String {
    let rows = admins.iter().map(|admin| {
        vec![
            admin.name.clone(),
            admin.key.to_string(),
            admin.state.to_owned(),
            output::or_dash(admin.created_at.as_ref()),
        ]
    });
    output::table(&["NAME", "KEY", "STATE", "SINCE"], rows)
}
