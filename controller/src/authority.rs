//! Certificate authority of the mesh: one Ed25519 key that signs certificates (X.509) and
//! statements ([`towline_proto::signed`]).
//!
//! The key is in a separate file and never in the store. The CA's certificate contains the mesh id,
//! so the id is fixed at the first start. Of a certificate signing request only the public key
//! enters a certificate.

use std::time::Duration;

use data_encoding::HEXLOWER;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ED25519, PublicKeyData,
    SanType, SerialNumber,
};
use ring::signature::Ed25519KeyPair;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivatePkcs8KeyDer};
use towline_proto::id::{Fingerprint, IdentityKey, MeshId, NodeId};
use towline_proto::limits;
use towline_proto::node::{Grant, Head, MeshConfig, Tombstone};
use towline_proto::signed::{self, Domain};
use towline_proto::{CONTROLLER_TLS_NAME, pb};
use towline_service::{certificate, pem};

use crate::entropy::{self, NoEntropy};
use crate::peer;
use crate::state_dir::{StateDir, StateError};
use crate::store_secret::StoreSecret;
use towline_registry::LOCAL_ADMIN;

/// Lifetime of a node's certificate. The agent renews it in time.
pub const NODE_LIFE: Duration = Duration::from_secs(24 * 3600);
/// Lifetime of the controller's own certificate, which it renews while it runs.
pub const SERVER_LIFE: Duration = Duration::from_secs(24 * 3600);
/// Lifetime of the administrator's certificate, which the controller renews while it runs.
pub const ADMIN_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);
/// Time by which the start of a certificate's validity is set back, for clients whose clocks are
/// behind.
pub const BACKDATED: Duration = Duration::from_secs(3600);
/// Lifetime of the CA's own certificate.
const CA_LIFE: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// Certificate authority of the mesh, with its private key.
pub struct Authority {
    mesh_id: MeshId,
    certificate: CertificateDer<'static>,
    fingerprint: Fingerprint,
    public_key: IdentityKey,
    issuer: Issuer<'static, KeyPair>,
    statements: Ed25519KeyPair,
    store_secret: StoreSecret,
}

/// Error of loading or creating the CA, or of issuing a certificate.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The CA's files cannot be read or written.
    #[error(transparent)]
    State(#[from] StateError),
    /// One of the CA's two files is missing.
    #[error(
        "{missing} is missing: the mesh was set up before: restore it from a backup, or set up a \
         new mesh in an empty state directory"
    )]
    Gone {
        /// Path of the file.
        missing: String,
    },
    /// The secret that authenticates the store is missing.
    #[error(
        "{missing} is missing: restore it from a backup, or if an earlier version of the controller \
         wrote the store, start once with `serve --migrate-store`"
    )]
    NoStoreKey {
        /// Path of the file.
        missing: String,
    },
    /// The operating system provides no random bytes.
    #[error(transparent)]
    Entropy(#[from] NoEntropy),
    /// Signing failed.
    #[error("cannot issue a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
}

/// Reason to refuse a certificate signing request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCsr {
    /// The request is not PKCS#10, or its signature does not verify.
    #[error("the certificate signing request is malformed, or its signature does not verify")]
    Malformed,
    /// The request is longer than [`limits::CSR_BYTES`].
    #[error("the certificate signing request is too long")]
    TooLong,
    /// The request is for a key that is not Ed25519.
    #[error("the certificate signing request is not for an Ed25519 key")]
    Algorithm,
}

/// Subject of a certificate.
#[derive(Debug, Clone, Copy)]
pub enum Subject<'a> {
    /// The controller.
    Controller,
    /// An administrator of this name.
    Admin(&'a str),
    /// The node with this id.
    Node(NodeId),
}

impl Authority {
    /// Reads the CA from the credentials of the service manager or from the state directory. If `fresh` is
    /// set, nothing was signed with it yet, and missing files are created. This also completes a first
    /// start that was interrupted between the two files. A certificate that is a credential is copied to
    /// the state directory, where the command line reads it.
    pub fn load_or_create(dir: &StateDir, fresh: bool, now: i64) -> Result<Self, AuthorityError> {
        let gone =
            |name: &str| AuthorityError::Gone { missing: dir.file(name).display().to_string() };
        let passed = dir.credential("ca.key")?;
        let stored = if passed.is_some() { passed } else { dir.read_key("ca.key")? };
        let key = match stored {
            Some(pem) => key_pair(&pem)
                .ok_or_else(|| dir.damaged("ca.key", "it does not contain an Ed25519 key"))?,
            None if fresh => {
                let key = KeyPair::generate_for(&PKCS_ED25519)?;
                dir.write("ca.key", 0o600, &pem::private_key(key.serialized_der()))?;
                key
            }
            None => return Err(gone("ca.key")),
        };
        let stored = dir.read("ca.crt")?;
        let stored = match dir.credential("ca.crt")? {
            Some(passed) if stored.as_ref() != Some(&*passed) => {
                dir.write("ca.crt", 0o644, &passed)?;
                Some(String::clone(&passed))
            }
            Some(_) | None => stored,
        };
        let certificate = match stored {
            Some(pem) => CertificateDer::from_pem_slice(pem.as_bytes())
                .map_err(|_| dir.damaged("ca.crt", "it does not contain a certificate"))?,
            None if fresh => {
                let certificate = ca_params(MeshId(entropy::random()?), now)?.self_signed(&key)?;
                dir.write("ca.crt", 0o644, &pem::certificate(certificate.der()))?;
                certificate.into()
            }
            None => return Err(gone("ca.crt")),
        };
        let passed = dir.credential(STORE_KEY)?;
        let stored = if passed.is_some() { passed } else { dir.read_key(STORE_KEY)? };
        let store_secret = match stored {
            Some(text) => StoreSecret::parse(&text)
                .ok_or_else(|| dir.damaged(STORE_KEY, "it does not contain keys"))?,
            None if fresh => create_store_key(dir)?,
            None => {
                let missing = dir.file(STORE_KEY).display().to_string();
                return Err(AuthorityError::NoStoreKey { missing });
            }
        };
        Self::new(certificate, key, store_secret)
            .ok_or_else(|| dir.damaged("ca.crt", "it is not the certificate of ca.key").into())
    }

    fn new(
        certificate: CertificateDer<'static>,
        key: KeyPair,
        store_secret: StoreSecret,
    ) -> Option<Self> {
        let (mesh_id, public_key) = peer::mesh_authority(&certificate)?;
        if key.public_key_raw() != public_key.as_bytes() {
            return None;
        }
        let statements = Ed25519KeyPair::from_pkcs8_maybe_unchecked(key.serialized_der()).ok()?;
        let fingerprint = certificate::fingerprint(&certificate);
        let issuer = Issuer::from_ca_cert_der(&certificate, key).ok()?;
        Some(Self {
            mesh_id,
            certificate,
            fingerprint,
            public_key,
            issuer,
            statements,
            store_secret,
        })
    }

    /// Returns the id of the CA's mesh.
    pub fn mesh_id(&self) -> MeshId {
        self.mesh_id
    }

    /// Returns the secret that authenticates the store's records.
    pub(crate) fn store_secret(&self) -> &StoreSecret {
        &self.store_secret
    }

    /// Returns the CA's certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Returns the SHA-256 of the CA's certificate, which tokens contain.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Returns the public key that verifies the CA's statements.
    pub fn public_key(&self) -> &IdentityKey {
        &self.public_key
    }

    /// Signs a grant.
    pub fn sign_grant(&self, grant: &Grant) -> pb::Signed {
        signed::sign(Domain::Grant, &pb::Grant::from(grant), &self.statements)
    }

    /// Signs a tombstone.
    pub fn sign_tombstone(&self, tombstone: &Tombstone) -> pb::Signed {
        signed::sign(Domain::Tombstone, &pb::Tombstone::from(tombstone), &self.statements)
    }

    /// Signs the mesh configuration.
    pub fn sign_mesh(&self, mesh: &MeshConfig) -> pb::Signed {
        signed::sign(Domain::Mesh, &pb::MeshConfig::from(mesh), &self.statements)
    }

    /// Signs a head of the map.
    pub fn sign_head(&self, head: &Head) -> pb::Signed {
        signed::sign(Domain::Head, &pb::Head::from(head), &self.statements)
    }

    /// Issues a certificate for a key of the subject. `now` is in seconds since 1970.
    pub fn issue(
        &self,
        subject: Subject<'_>,
        key: &impl PublicKeyData,
        now: i64,
    ) -> Result<CertificateDer<'static>, AuthorityError> {
        let life = match subject {
            Subject::Controller => SERVER_LIFE,
            Subject::Admin(_) => ADMIN_LIFE,
            Subject::Node(_) => NODE_LIFE,
        };
        let mut params = params(now, life)?;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![match subject {
            Subject::Controller => ExtendedKeyUsagePurpose::ServerAuth,
            Subject::Admin(_) | Subject::Node(_) => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        let (name, san) = match subject {
            Subject::Controller => (
                "towline controller".to_owned(),
                SanType::DnsName(CONTROLLER_TLS_NAME.to_owned().try_into()?),
            ),
            Subject::Admin(admin) => {
                (format!("towline admin {admin}"), uri(&peer::admin_uri(self.mesh_id, admin))?)
            }
            Subject::Node(node) => {
                (format!("towline node {node}"), uri(&peer::node_uri(self.mesh_id, node))?)
            }
        };
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names = vec![san];
        Ok(params.signed_by(key, &self.issuer)?.into())
    }
}

/// Verifies the signature of a certificate signing request and returns its Ed25519 key. All other
/// fields of the request are ignored.
pub fn csr_key(der: &[u8]) -> Result<(IdentityKey, impl PublicKeyData), InvalidCsr> {
    if der.len() > limits::CSR_BYTES {
        return Err(InvalidCsr::TooLong);
    }
    let csr = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(der))
        .map_err(|_| InvalidCsr::Malformed)?;
    if csr.public_key.algorithm() != &PKCS_ED25519 {
        return Err(InvalidCsr::Algorithm);
    }
    let key =
        IdentityKey::try_from(csr.public_key.der_bytes()).map_err(|_| InvalidCsr::Algorithm)?;
    Ok((key, csr.public_key))
}

/// File with the secret that authenticates the store's records.
const STORE_KEY: &str = "store.key";

/// Creates the secret that authenticates the store's records, unless there is one, for the migration of a store
/// that an earlier version wrote.
pub fn prepare_migration(dir: &StateDir) -> Result<(), AuthorityError> {
    if dir.credential(STORE_KEY)?.is_none() && dir.read_key(STORE_KEY)?.is_none() {
        create_store_key(dir)?;
    }
    Ok(())
}

fn create_store_key(dir: &StateDir) -> Result<StoreSecret, AuthorityError> {
    let (secret, text) = StoreSecret::generate()?;
    dir.write(STORE_KEY, 0o600, &text)?;
    Ok(secret)
}

/// Creates the administrator's key if there is none or if it was revoked, and issues a new certificate for it.
/// Returns the public key.
pub fn renew_admin(
    dir: &StateDir,
    authority: &Authority,
    now: i64,
    mut is_revoked: impl FnMut(IdentityKey) -> bool,
) -> Result<IdentityKey, AuthorityError> {
    let kept = dir.read_key("admin.key")?.and_then(|pem| key_pair(&pem));
    let key = match kept.filter(|key| public_key(key).is_some_and(|key| !is_revoked(key))) {
        Some(key) => key,
        None => create_admin_key(dir)?,
    };
    let certificate = authority.issue(Subject::Admin(LOCAL_ADMIN), &key, now)?;
    dir.write("admin.crt", 0o600, &pem::certificate(&certificate))?;
    // A key that was just used has a public part of 32 bytes.
    public_key(&key).ok_or_else(|| dir.damaged("admin.key", "it is not an Ed25519 key").into())
}

/// Returns a certificate signing request (PKCS#10, DER) for the administrator's key in a directory. Creates both if
/// there is none.
pub fn admin_request(dir: &StateDir) -> Result<Vec<u8>, AuthorityError> {
    let key = match dir.read_key("admin.key")? {
        Some(pem) => {
            key_pair(&pem).ok_or_else(|| dir.damaged("admin.key", "it is not an Ed25519 key"))?
        }
        None => create_admin_key(dir)?,
    };
    Ok(CertificateParams::default().serialize_request(&key)?.der().to_vec())
}

fn create_admin_key(dir: &StateDir) -> Result<KeyPair, AuthorityError> {
    let key = KeyPair::generate_for(&PKCS_ED25519)?;
    dir.write("admin.key", 0o600, &pem::private_key(key.serialized_der()))?;
    Ok(key)
}

/// Returns the public part of a key.
fn public_key(key: &KeyPair) -> Option<IdentityKey> {
    IdentityKey::try_from(key.public_key_raw()).ok()
}

/// Generates a key for the controller and issues a certificate for it.
pub fn server_credential(
    authority: &Authority,
    now: i64,
) -> Result<(CertificateDer<'static>, PrivatePkcs8KeyDer<'static>), AuthorityError> {
    let key = KeyPair::generate_for(&PKCS_ED25519)?;
    Ok((authority.issue(Subject::Controller, &key, now)?, key.into()))
}

/// Returns the Ed25519 key in PEM text, or `None` if it has none.
fn key_pair(text: &str) -> Option<KeyPair> {
    let der = pem::read_private_key(text)?;
    let der = PrivatePkcs8KeyDer::from(der.as_slice());
    KeyPair::from_pkcs8_der_and_sign_algo(&der, &PKCS_ED25519).ok()
}

fn uri(text: &str) -> Result<SanType, rcgen::Error> {
    Ok(SanType::URI(text.to_owned().try_into()?))
}

fn params(now: i64, life: Duration) -> Result<CertificateParams, AuthorityError> {
    let mut serial: [u8; 16] = entropy::random()?;
    // RFC 5280 section 4.1.2.2: a serial number is positive.
    serial[0] = serial[0] & 0x7f | 0x40;
    let mut params = CertificateParams::default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let seconds = u64::try_from(now).unwrap_or(0);
    params.not_before = epoch + Duration::from_secs(seconds).saturating_sub(BACKDATED);
    params.not_after = epoch + (Duration::from_secs(seconds) + life);
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.distinguished_name = rcgen::DistinguishedName::new();
    Ok(params)
}

fn ca_params(mesh_id: MeshId, now: i64) -> Result<CertificateParams, AuthorityError> {
    let mut params = params(now, CA_LIFE)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let name = format!("towline mesh {}", HEXLOWER.encode(&mesh_id.0));
    params.distinguished_name.push(DnType::CommonName, name);
    params.subject_alt_names = vec![uri(&peer::mesh_uri(mesh_id))?];
    Ok(params)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn authority(dir: &StateDir) -> Authority {
        Authority::load_or_create(dir, true, 1_700_000_000).unwrap()
    }

    #[test]
    fn the_authority_is_the_same_after_a_restart_and_is_never_made_twice() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(root.path());
        let first = authority(&dir);
        let again = Authority::load_or_create(&dir, false, 1_800_000_000).unwrap();
        assert_eq!(first.fingerprint(), again.fingerprint());
        assert_eq!(first.mesh_id(), again.mesh_id());

        dir.remove("ca.crt").unwrap();
        let error = Authority::load_or_create(&dir, false, 0).err().unwrap();
        assert!(error.to_string().contains("ca.crt is missing"), "{error}");
        dir.remove("ca.key").unwrap();
        let error = Authority::load_or_create(&dir, false, 0).err().unwrap();
        assert!(error.to_string().contains("ca.key is missing"), "{error}");
    }

    #[test]
    fn the_authority_of_another_controller_can_be_passed_as_credentials() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let theirs = authority(&StateDir::new(first.path()));
        let credentials = Some(first.path().to_owned());
        let dir = StateDir::new(second.path().join("state")).with_credentials(credentials);
        let ours = Authority::load_or_create(&dir, false, 0).unwrap();
        assert_eq!(ours.fingerprint(), theirs.fingerprint());
        assert!(dir.read_key("ca.key").unwrap().is_none(), "the key stays where it was passed");
        assert!(dir.read("ca.crt").unwrap().is_some(), "the command line reads it");
        Authority::load_or_create(&dir, false, 0).unwrap();
    }

    #[test]
    fn a_key_of_another_authority_or_no_key_at_all_is_told_and_kept() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(root.path());
        authority(&dir);
        let other = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        dir.write("ca.key", 0o600, &pem::private_key(other.serialized_der())).unwrap();
        let error = Authority::load_or_create(&dir, true, 0).err().unwrap();
        assert!(error.to_string().contains("not the certificate of ca.key"), "{error}");
        dir.write("ca.key", 0o600, "junk").unwrap();
        let error = Authority::load_or_create(&dir, true, 0).err().unwrap();
        assert!(error.to_string().contains("not contain an Ed25519 key"), "{error}");
        assert_eq!(dir.read("ca.key").unwrap().as_deref(), Some("junk"));
    }

    #[test]
    fn the_administrators_key_is_kept_until_it_is_revoked() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::new(root.path());
        let authority = authority(&dir);
        let first = renew_admin(&dir, &authority, 0, |_| false).unwrap();
        assert_eq!(renew_admin(&dir, &authority, 1, |_| false).unwrap(), first);
        let second = renew_admin(&dir, &authority, 2, |key| key == first).unwrap();
        assert_ne!(second, first);
        assert_eq!(renew_admin(&dir, &authority, 3, |key| key == first).unwrap(), second);
    }

    #[test]
    fn only_the_key_of_a_signing_request_reaches_the_certificate() {
        let root = tempfile::tempdir().unwrap();
        let authority = authority(&StateDir::new(root.path()));
        let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let admin = peer::admin_uri(authority.mesh_id(), "local");
        let mut asked = CertificateParams::new([CONTROLLER_TLS_NAME.to_owned()]).unwrap();
        asked.subject_alt_names.push(uri(&admin).unwrap());
        let csr = asked.serialize_request(&key).unwrap();

        let (identity, public) = csr_key(csr.der()).unwrap();
        assert_eq!(identity.as_bytes().as_slice(), key.public_key_raw());
        let node = NodeId([5; 16]);
        let der = authority.issue(Subject::Node(node), &public, 1_700_000_000).unwrap();
        let seen = peer::Peer::from_certificate(&der).unwrap();
        assert_eq!(seen.name, peer::PeerName::Node(node));
        assert_eq!(seen.key, identity);
    }

    #[test]
    fn signing_requests_of_another_kind_are_refused() {
        let ecdsa = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let csr = CertificateParams::default().serialize_request(&ecdsa).unwrap();
        assert_eq!(csr_key(csr.der()).err(), Some(InvalidCsr::Algorithm));
        assert_eq!(csr_key(b"junk").err(), Some(InvalidCsr::Malformed));
        assert_eq!(csr_key(&[0; limits::CSR_BYTES + 1]).err(), Some(InvalidCsr::TooLong));
        let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let mut forged =
            CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
        *forged.last_mut().unwrap() ^= 1;
        assert_eq!(csr_key(&forged).err(), Some(InvalidCsr::Malformed));
    }
}
