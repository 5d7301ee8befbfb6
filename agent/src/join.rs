//! Joining a mesh with a token, and renewing the certificate of a member.
//!
//! The order of a join: the keys are created and stored, the CA is pinned by the token's
//! fingerprint before anything is sent, the controller's clock is compared with this machine's, and
//! then the token is used. The response is verified with the pinned CA and stored. An interrupted
//! join can simply be repeated: the controller answers the same identity key with the same grant.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ipnet::IpNet;
use rustls_pki_types::CertificateDer;
use tonic::transport::Channel;
use towline_proto::id::{NodeName, WireguardKey};
use towline_proto::limits;
use towline_proto::node::MeshConfig;
use towline_proto::pb;
use towline_proto::pb::discovery_client::DiscoveryClient;
use towline_proto::token::{ControllerAddress, JoinToken};
use towline_service::grpc;

use crate::dial::{self, DialError};
use crate::host_addresses;
use crate::keys::{Identity, InvalidKey};
use crate::lockout::{self, CutOff, SshSession};
use crate::state::{InvalidMembership, Keys, Membership, StateDir, StateError};
use crate::tls;
use towline_host::{CandidatePolicy, HostNetwork};

/// Environment variable with a join token.
pub(crate) const TOKEN_VARIABLE: &str = "TOWLINE_TOKEN";

/// Error of a join or a renewal.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// No controller can be reached, or its certificate is not from the pinned CA.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The controller refused the request; its message names the remedy.
    #[error("{}", status_message(.0))]
    Refused(#[from] tonic::Status),
    /// The clocks differ too much: certificates and handshakes would fail later.
    #[error(
        "this machine's clock is {skew_seconds} s {direction} the controller's: set it (`timedatectl set-ntp true`) and join again"
    )]
    Clock {
        /// Difference of the clocks, in seconds.
        skew_seconds: u64,
        /// Direction of the difference: "behind" or "ahead of".
        direction: &'static str,
    },
    /// A statement of the controller is not signed by the pinned CA.
    #[error("invalid response from the controller: {0}")]
    Untrusted(#[from] InvalidMembership),
    /// The controller's response lacks a part.
    #[error("invalid response from the controller: no {0}: check that its version matches")]
    Incomplete(&'static str),
    /// A network of the mesh covers the gateway of this machine's uplink.
    #[error(
        "the mesh's network {range} covers {gateway}, the gateway of this machine's uplink: change \
         one of the two networks, then join again with the same token"
    )]
    Gateway {
        /// Network of the mesh.
        range: IpNet,
        /// Gateway of this machine.
        gateway: IpAddr,
    },
    /// The mesh would cut off the operator's own SSH session.
    #[error("{0}")]
    CutOff(CutOff),
    /// A key cannot be used.
    #[error(transparent)]
    Key(#[from] InvalidKey),
    /// The state directory cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// TLS cannot be set up.
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The machine is already a member under another name.
    #[error(
        "this machine is already `{have}` of mesh {mesh}: run `towline leave` first, to join as `{want}`"
    )]
    OtherName {
        /// Name of this machine in the mesh.
        have: NodeName,
        /// Mesh that the machine joined.
        mesh: towline_proto::id::MeshId,
        /// Requested name.
        want: NodeName,
    },
}

impl JoinError {
    /// Returns whether the same token may succeed later: no controller answered, or the clock was
    /// wrong.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Dial(error) => !matches!(error, DialError::WrongCa { .. }),
            Self::Refused(status) => matches!(
                status.code(),
                tonic::Code::Unavailable
                    | tonic::Code::Unknown
                    | tonic::Code::Cancelled
                    | tonic::Code::DeadlineExceeded
                    | tonic::Code::ResourceExhausted
                    | tonic::Code::Internal
            ),
            Self::Clock { .. } => true,
            _ => false,
        }
    }
}

/// Result of a join.
#[derive(Debug)]
pub enum Joined {
    /// The machine is now a member.
    New(Membership),
    /// The machine was a member before. Nothing was changed, and the token was not used.
    Already(Membership),
}

/// How the operator is connected to this machine. A mesh must not cut off these connections.
#[derive(Debug, Clone, Default)]
pub struct Operator {
    /// SSH sessions of the operator. Empty if there are none, or if they may be cut off.
    pub sessions: Vec<SshSession>,
    /// TCP ports that are reached outside the tunnel too.
    pub plain_ports: Vec<u16>,
}

impl Operator {
    /// Fails if guarding `networks` would cut off one of the sessions. The error names the session.
    pub fn refuse_cut_off(&self, networks: &[IpNet]) -> Result<(), JoinError> {
        let found = lockout::cut_off(&self.sessions, networks, &self.plain_ports);
        found.into_iter().next().map_or(Ok(()), |cut_off| Err(JoinError::CutOff(cut_off)))
    }
}

/// Joins a mesh, unless the machine is a member already.
pub async fn join(
    state: &StateDir,
    token: &JoinToken,
    name: &NodeName,
    mark: u32,
) -> Result<Joined, JoinError> {
    join_as(state, token, name, mark, &Operator::default()).await
}

/// Joins a mesh, unless the machine is a member already or the mesh would cut off its operator.
pub async fn join_as(
    state: &StateDir,
    token: &JoinToken,
    name: &NodeName,
    mark: u32,
    operator: &Operator,
) -> Result<Joined, JoinError> {
    if let Some(membership) = state.membership()? {
        if membership.grant.name != *name {
            return Err(JoinError::OtherName {
                have: membership.grant.name,
                mesh: membership.grant.mesh_id,
                want: name.clone(),
            });
        }
        return Ok(Joined::Already(membership));
    }
    let keys = state.keys_or_generate()?;
    let (channel, ca) = first_reachable(token, mark).await?;
    let mut client = client(channel);
    let hello = client.hello(pb::HelloRequest {}).await?.into_inner();
    check_clock(hello.server_time_ms, SystemTime::now())?;
    let answer = client.join(request(token, name, &keys, &hello)?).await?.into_inner();
    let membership = Membership::new(
        ca,
        token.controllers.clone(),
        answer.grant.ok_or(JoinError::Incomplete("grant"))?,
        answer.mesh.ok_or(JoinError::Incomplete("mesh configuration"))?,
    )?;
    membership.check_own(name, &keys)?;
    let gateways = HostNetwork::open().and_then(|mut network| network.gateways());
    refuse_covered(&membership.mesh, &gateways.unwrap_or_default())?;
    operator.refuse_cut_off(&membership.mesh.guarded().collect::<Vec<_>>())?;
    state.store_connected_networks(&connected_networks(&membership.mesh))?;
    state.store_host_addresses(host_addresses::read(&membership.mesh))?;
    // The certificate is stored first, because the membership marks the join as complete.
    state.store_certificate(&chain(answer.certificate_chain)?)?;
    state.store_membership(&membership)?;
    Ok(Joined::New(membership))
}

/// Returns the networks to which this machine is connected. A join does not fail where they cannot be
/// read.
fn connected_networks(mesh: &MeshConfig) -> Vec<IpNet> {
    let excluded = mesh.overlays().to_vec();
    let policy = CandidatePolicy { excluded, ..CandidatePolicy::default() };
    let found = HostNetwork::open().and_then(|mut network| network.connected_networks(&policy));
    found.unwrap_or_else(|error| {
        tracing::warn!(%error, "local networks not read");
        Vec::new()
    })
}

/// Returns a new certificate chain and the current grant.
pub async fn renew(
    channel: Channel,
    identity: &Identity,
) -> Result<(Vec<CertificateDer<'static>>, Option<pb::Signed>), JoinError> {
    let csr = identity.signing_request()?;
    let answer = client(channel).renew(pb::RenewRequest { csr }).await?.into_inner();
    Ok((chain(answer.certificate_chain)?, answer.grant))
}

/// Returns a discovery client with the message limits of both sides.
pub fn client(channel: Channel) -> DiscoveryClient<Channel> {
    DiscoveryClient::new(channel)
        .max_decoding_message_size(limits::MESSAGE_BYTES)
        .max_encoding_message_size(limits::MESSAGE_BYTES)
}

/// Connects to the first controller of the token that can be reached and has the pinned CA.
async fn first_reachable(
    token: &JoinToken,
    mark: u32,
) -> Result<(Channel, CertificateDer<'static>), JoinError> {
    let config = Arc::new(tls::joining(token.ca)?);
    let mut last = None;
    for address in &token.controllers {
        match dial::dial(address, config.clone(), mark).await {
            Ok(connection) => match tls::pinned_ca(&connection.chain, token.ca) {
                Some(ca) => return Ok((connection.channel, ca)),
                None => last = Some(DialError::WrongCa { address: address.clone() }),
            },
            Err(error) => {
                tracing::debug!(%address, %error, "controller not reached");
                last = Some(error);
            }
        }
    }
    // A token contains at least one address.
    Err(last.map_or(JoinError::Incomplete("address"), JoinError::Dial))
}

/// Fails if this machine's clock differs too much from the controller's.
fn check_clock(server_time_ms: i64, now: SystemTime) -> Result<(), JoinError> {
    let ours = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let theirs = Duration::from_millis(u64::try_from(server_time_ms).unwrap_or(0));
    let skew = ours.abs_diff(theirs);
    if skew <= limits::CLOCK_SKEW {
        return Ok(());
    }
    let direction = if ours < theirs { "behind" } else { "ahead of" };
    Err(JoinError::Clock { skew_seconds: skew.as_secs(), direction })
}

/// Fails if the mesh covers a gateway. The machine would lose the gateway's own services and its
/// ICMP errors.
fn refuse_covered(mesh: &MeshConfig, gateways: &[IpAddr]) -> Result<(), JoinError> {
    for range in mesh.guarded() {
        if let Some(gateway) = gateways.iter().find(|gateway| range.contains(*gateway)) {
            return Err(JoinError::Gateway { range, gateway: *gateway });
        }
    }
    Ok(())
}

/// Creates the join request, with a proof of having the WireGuard private key.
pub fn request(
    token: &JoinToken,
    name: &NodeName,
    keys: &Keys,
    hello: &pb::HelloResponse,
) -> Result<pb::JoinRequest, JoinError> {
    let csr = keys.identity.signing_request()?;
    let incomplete = JoinError::Incomplete("usable proof key");
    let Ok(proof_key) = WireguardKey::try_from(hello.proof_key.as_slice()) else {
        return Err(incomplete);
    };
    let Some(proof) = keys.wireguard.join_proof(&proof_key, token.id, &csr) else {
        return Err(incomplete);
    };
    Ok(pb::JoinRequest {
        token_id: token.id.0.to_vec(),
        token_secret: token.secret.0.to_vec(),
        name: name.to_string(),
        csr,
        wireguard_key: keys.wireguard.public().0.to_vec(),
        wireguard_proof: proof,
        proof_key: hello.proof_key.clone(),
    })
}

/// Checks the bounds of a certificate chain.
fn chain(certificates: Vec<Vec<u8>>) -> Result<Vec<CertificateDer<'static>>, JoinError> {
    let sane = !certificates.is_empty()
        && certificates.len() <= limits::CERTIFICATES
        && certificates.iter().all(|cert| cert.len() <= limits::CERTIFICATE_BYTES);
    if !sane {
        return Err(JoinError::Incomplete("usable certificate"));
    }
    Ok(certificates.into_iter().map(CertificateDer::from).collect())
}

/// Returns the controller's message for the operator, or a description of the status without one.
pub fn status_message(status: &tonic::Status) -> String {
    let words = grpc::message(status);
    match words.as_str() {
        "" => format!("the controller refused: {}", status.code()),
        words if grpc::is_of_the_transport(status) => {
            format!("the controller did not answer: {words}")
        }
        words => format!("the controller refused: {words}"),
    }
}

/// Returns the effective list of controllers: the configured ones, or else those of the mesh's
/// configuration and then those of the join token, which help where that list became wrong.
pub fn controllers(
    configured: &[ControllerAddress],
    membership: &Membership,
) -> Vec<ControllerAddress> {
    if !configured.is_empty() {
        return configured.to_vec();
    }
    membership.mesh.controllers_and(&membership.controllers)
}

#[cfg(test)]
mod tests {
    use towline_fixtures::node::{mesh_config, net};

    use super::*;

    #[test]
    fn a_clock_an_hour_off_is_told_which_way() {
        let now = UNIX_EPOCH + Duration::from_secs(10_000);
        assert!(check_clock(10_000_000, now).is_ok());
        assert!(check_clock(10_299_000, now).is_ok());
        let behind = check_clock(13_600_000, now).unwrap_err().to_string();
        assert!(behind.contains("3600 s behind"), "{behind}");
        let ahead = check_clock(6_400_000, now).unwrap_err().to_string();
        assert!(ahead.contains("3600 s ahead of"), "{ahead}");
    }

    #[test]
    fn a_mesh_that_covers_the_gateway_is_not_joined_and_both_are_named() {
        let mesh = MeshConfig { protected: vec![net("10.0.0.0/8")], ..mesh_config() };
        let gateways = |text: &str| vec![text.parse::<IpAddr>().unwrap()];
        assert!(refuse_covered(&mesh, &[]).is_ok());
        assert!(refuse_covered(&mesh, &gateways("192.168.1.1")).is_ok());
        assert!(refuse_covered(&mesh, &gateways("fe80::1")).is_ok());
        let refusal = refuse_covered(&mesh, &gateways("10.3.0.1")).unwrap_err();
        assert!(!refusal.may_pass());
        let line = refusal.to_string();
        assert!(line.contains("10.0.0.0/8") && line.contains("10.3.0.1"), "{line}");
    }

    #[test]
    fn a_refusal_is_one_printable_line() {
        let status = tonic::Status::permission_denied("no\u{1b}[2J\nway");
        assert_eq!(status_message(&status), "the controller refused: no [2J way");
    }
}
