//! Where etcd is and how to reach it, as the configuration says it.

use std::fmt;
use std::path::PathBuf;

use towline_proto::limits;
use towline_proto::token::ControllerAddress;

/// Start of the URL of a store in etcd.
pub const SCHEME: &str = "etcd://";
/// First part of the keys where the URL names none.
const PREFIX: &str = "towline";
/// Parts that the prefix may not have: below another prefix, they are what a mesh keeps its records in.
const RESERVED: [&str; 4] = ["records", "staged", "presence", "signals"];
/// Largest length of the prefix of the keys, in bytes.
const PREFIX_BYTES: usize = 128;

/// URL of a store in etcd: `etcd://HOST:PORT,HOST:PORT/PREFIX`. The prefix is optional.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdUrl {
    /// Addresses of the members, at least one.
    endpoints: Vec<ControllerAddress>,
    /// First part of the keys, without a slash at its ends.
    prefix: String,
}

/// Settings of the store in etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdSettings {
    /// URL of the store.
    pub url: EtcdUrl,
    /// Files for TLS; `None` connects without TLS.
    pub tls: Option<TlsFiles>,
    /// User to log in as; `None` does not log in.
    pub login: Option<LoginFile>,
    /// True if several controllers serve the mesh at a time; false if one does and the others wait.
    pub is_shared: bool,
}

/// Files for TLS with etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// PEM file with the CA certificates that sign those of the members.
    pub ca: PathBuf,
    /// Client certificate, if etcd asks for one.
    pub client: Option<CertificateFiles>,
}

/// Files of a client certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFiles {
    /// PEM file with the certificate, and the intermediate ones after it.
    pub certificate: PathBuf,
    /// PEM file with the private key.
    pub key: PathBuf,
}

/// Name and password of a user of etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoginFile {
    /// Name of the user.
    pub user: String,
    /// File with the password. Blanks and line ends at its end do not belong to it.
    pub password: PathBuf,
}

/// Error of parsing the URL of a store. It does not contain the URL, which may have a password in it by
/// mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// The text does not begin with the scheme.
    #[error("not a store: use \"file\", or \"etcd://HOST:PORT,HOST:PORT\"")]
    Scheme,
    /// The URL has a user or a password.
    #[error("a user does not belong in the URL: use `user` and `password_file` in [etcd]")]
    User,
    /// An address is malformed.
    #[error("address {0} of etcd is not HOST:PORT")]
    Address(usize),
    /// The URL has no address, or too many.
    #[error("use 1 to {} addresses of etcd", limits::CONTROLLERS)]
    Count,
    /// The prefix is malformed.
    #[error("the prefix after the addresses may have letters, digits, `-`, `_`, `.` and `/`")]
    Prefix,
    /// The keys would be among those of another mesh.
    #[error(
        "no part of the prefix may be `records`, `staged`, `presence` or `signals`: a mesh has keys of these \
         names"
    )]
    Reserved,
}

impl EtcdUrl {
    /// Parses a URL.
    pub fn parse(text: &str) -> Result<Self, UrlError> {
        let rest = text.strip_prefix(SCHEME).ok_or(UrlError::Scheme)?;
        if rest.contains('@') {
            return Err(UrlError::User);
        }
        let (addresses, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let mut endpoints: Vec<ControllerAddress> = Vec::new();
        for (address, number) in addresses.split(',').zip(1..) {
            let address = address.parse().map_err(|_| UrlError::Address(number))?;
            if endpoints.len() >= limits::CONTROLLERS || endpoints.contains(&address) {
                return Err(UrlError::Count);
            }
            endpoints.push(address);
        }
        let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
        let prefix = if prefix.is_empty() { PREFIX } else { prefix };
        let is_part = |part: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && part.chars().all(allowed)
        };
        if prefix.len() > PREFIX_BYTES || !prefix.split('/').all(is_part) {
            return Err(UrlError::Prefix);
        }
        if prefix.split('/').any(|part| RESERVED.contains(&part)) {
            return Err(UrlError::Reserved);
        }
        Ok(Self { endpoints, prefix: prefix.to_owned() })
    }

    /// Returns the addresses of the members.
    pub fn endpoints(&self) -> &[ControllerAddress] {
        &self.endpoints
    }

    /// Returns the first part of the keys, with a slash at each end.
    pub fn key_prefix(&self) -> String {
        format!("/{}/", self.prefix)
    }

    /// Returns whether all members are on this machine.
    pub fn is_loopback(&self) -> bool {
        self.endpoints.iter().all(|endpoint| {
            let host = host(endpoint);
            host == "localhost"
                || host.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback())
        })
    }
}

impl fmt::Display for EtcdUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(SCHEME)?;
        for (place, endpoint) in self.endpoints.iter().enumerate() {
            f.write_str(if place == 0 { "" } else { "," })?;
            fmt::Display::fmt(endpoint, f)?;
        }
        write!(f, "/{}", self.prefix)
    }
}

/// Returns the host of an address, without the brackets of IPv6.
pub(super) fn host(endpoint: &ControllerAddress) -> &str {
    let text = endpoint.as_str();
    let host = text.rsplit_once(':').map_or(text, |(host, _)| host);
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_has_addresses_and_perhaps_a_prefix() {
        let url = EtcdUrl::parse("etcd://a:2379,[::1]:2379").unwrap();
        assert_eq!(url.to_string(), "etcd://a:2379,[::1]:2379/towline");
        assert_eq!(url.key_prefix(), "/towline/");
        assert!(!url.is_loopback());
        assert_eq!(EtcdUrl::parse(&url.to_string()), Ok(url));
        let url =
            EtcdUrl::parse("etcd://127.0.0.1:2379,[::1]:2379,localhost:1/prod/mesh-1/").unwrap();
        assert_eq!(url.key_prefix(), "/prod/mesh-1/");
        assert!(url.is_loopback());
    }

    #[test]
    fn what_is_wrong_with_a_url_is_told_without_the_url() {
        let refused = |text: &str| {
            let error = EtcdUrl::parse(text).unwrap_err();
            assert!(!error.to_string().contains("secret"), "{error}");
            error
        };
        assert_eq!(refused("http://secret:2379"), UrlError::Scheme);
        assert_eq!(refused("etcd://root:secret@a:2379"), UrlError::User);
        assert_eq!(refused("etcd://a:2379,secret"), UrlError::Address(2));
        assert_eq!(refused("etcd://"), UrlError::Address(1));
        assert_eq!(refused("etcd://a:1,a:1"), UrlError::Count);
        let many: Vec<String> = (1..=9).map(|port| format!("a:{port}")).collect();
        assert_eq!(refused(&format!("etcd://{}", many.join(","))), UrlError::Count);
        assert_eq!(refused("etcd://a:1/towline/records"), UrlError::Reserved);
        for prefix in ["a b", "//", "a//b", "a\n", &"x".repeat(200)] {
            assert_eq!(refused(&format!("etcd://a:1/{prefix}")), UrlError::Prefix, "{prefix}");
        }
    }
}
