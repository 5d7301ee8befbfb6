//! Configuration of the controller: flags override the environment, which overrides the file. All
//! of it is parsed before any file or socket is opened.

use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use jiff::SignedDuration;
use serde::{Deserialize, Deserializer};
use towline_proto::id::Label;
use towline_proto::limits;
use towline_proto::token::ControllerAddress;
use towline_service::config_file::{self, FileError};
use towline_service::log::LogConfig;

use crate::store::Location;
use crate::store::etcd::{
    CertificateFiles, EtcdSettings, EtcdUrl, LoginFile, SCHEME, TlsFiles, UrlError,
};

/// Configuration file that is read if `--config` is not given. It need not exist.
pub const FILE: &str = "/etc/towline/controller.toml";
/// Default state directory.
pub const STATE_DIR: &str = "/var/lib/towline-controller";
/// Environment variable in which systemd names the directory of the credentials of a service
/// (systemd.exec(5), `LoadCredential=`).
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";
/// Default store: a file in the state directory.
pub const FILE_STORE: &str = "file";
/// Default listening address: all addresses, or those of IPv4 on a machine without IPv6.
pub const LISTEN: &str = "[::]:7443";
/// Default IPv4 range of the overlay. It does not overlap RFC 1918 or 100.64.0.0/10.
pub const OVERLAY_V4: &str = "198.19.0.0/16";
/// Default lease.
pub const LEASE: Duration = Duration::from_secs(600);
/// Interval at which each side of a watch sends a heartbeat. Three missed ones end the watch, so a
/// stream that is dead behind a proxy ends within 45 s. A dead TCP connection is noticed earlier,
/// see [`listen`](crate::listen). At 10,000 nodes this is 667 messages per second in each direction.
pub const HEARTBEAT: Duration = Duration::from_secs(15);

/// Largest number of further addresses of the STUN server.
const STUN_ADDRESSES: usize = 8;

/// Complete configuration of the controller, with defaults applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// State directory.
    pub state_dir: PathBuf,
    /// Directory of the credentials that systemd passes to the service, if it passes any.
    pub credentials: Option<PathBuf>,
    /// Location of the store.
    pub store: Location,
    /// Listening address.
    pub listen: SocketAddr,
    /// Addresses of the controllers that are written into tokens. At the first start they become the
    /// mesh's list of controllers.
    pub advertise: Vec<ControllerAddress>,
    /// Settings of the mesh.
    pub mesh: MeshSettings,
    /// Interval at which each side of a watch sends a heartbeat.
    pub heartbeat: Duration,
    /// Address at which `GET /metrics` and the probes are answered, without TLS and login. `None`: nowhere.
    pub metrics: Option<SocketAddr>,
    /// Web page. `None`: there is none.
    pub ui: Option<UiConfig>,
    /// Second port of the STUN server. `None`: it has none, and does not tell how a NAT filters.
    pub stun: Option<StunConfig>,
    /// True if administrators may also connect over the network, with a certificate.
    pub remote_admin: bool,
    /// True if records of the store that are not authenticated are taken at this start, and authenticated.
    pub migrate_store: bool,
}

/// Configuration of the web page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UiConfig {
    /// Address on which the page is served, without TLS and login.
    pub listen: SocketAddr,
    /// Host names by which browsers may call the page, in lower case. IP addresses of this machine and
    /// `localhost` are always accepted.
    pub hosts: Vec<String>,
}

/// Configuration of the STUN server's second port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StunConfig {
    /// UDP port beside that of `listen`.
    pub other_port: NonZeroU16,
    /// Addresses of this machine from which the server answers, if another address than the one that was
    /// asked is wanted. Empty: it always answers from the address that was asked.
    pub addresses: Vec<IpAddr>,
}

/// Settings of the mesh, which are stored. A setting that is `None` stays unchanged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MeshSettings {
    /// IPv6 range of the overlay. A new mesh gets a random /64 of fd00::/8 by default.
    pub overlay_v6: Option<Ipv6Net>,
    /// IPv4 range of the overlay.
    pub overlay_v4: Option<Ipv4Net>,
    /// Ranges in which an address that no node holds is unreachable instead of sent in clear.
    pub protected: Option<Vec<IpNet>>,
    /// Sites whose nodes reach each other's node IPs outside of the tunnel.
    pub trusted_sites: Option<Vec<Label>>,
    /// Ranges in which a node's announced prefixes are reached in clear while the tunnel to it is
    /// down.
    pub bypass_when_down: Option<Vec<IpNet>>,
    /// Time that a node may be offline before other nodes may take over its prefixes.
    pub lease: Option<Duration>,
}

/// Settings from one source: the file, or flags and environment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Directory of the CA, the administrator's credential and the store, mode 0700.
    pub state_dir: Option<PathBuf>,
    /// Store of the mesh: `file` is one file in the state directory. `etcd://HOST:PORT,HOST:PORT` is an etcd
    /// cluster (3.4 or later), whose keys begin with `/towline/`; `etcd://HOST:PORT/PREFIX` names another
    /// prefix. Several controllers with the same CA may name one cluster: one of them serves, and the others wait,
    /// or with `shared` in `[etcd]` all of them serve.
    pub store: Option<String>,
    /// Address on which the controller listens. The default is every address of both families, or of
    /// IPv4 alone where the machine has no IPv6.
    pub listen: Option<SocketAddr>,
    /// Addresses, each `host:port`, at which nodes reach the controller. They are written into the
    /// tokens, and at the first start they become the mesh's list of controllers. Empty: the listening
    /// address, if that is a single one.
    #[serde(deserialize_with = "from_texts")]
    pub advertise: Option<Vec<ControllerAddress>>,
    /// True if administrators may also connect over the network, with the certificate `admin.crt` and its key. By
    /// default they use the controller's local socket.
    pub remote_admin: Option<bool>,
    /// IPv6 range of the overlay. It can change only while the mesh has no node. A new mesh gets a
    /// random /64 of fd00::/8 by default.
    #[serde(deserialize_with = "from_text")]
    pub overlay_v6: Option<Ipv6Net>,
    /// IPv4 range of the overlay. It can change only while the mesh has no node.
    #[serde(deserialize_with = "from_text")]
    pub overlay_v4: Option<Ipv4Net>,
    /// Ranges in which an address that no node holds is unreachable instead of sent in clear. An absent
    /// key keeps the stored ranges.
    #[serde(deserialize_with = "from_texts")]
    pub protected: Option<Vec<IpNet>>,
    /// Sites whose nodes reach each other's node IPs outside of the tunnel. An absent key keeps the
    /// stored sites.
    #[serde(deserialize_with = "from_texts")]
    pub trusted_sites: Option<Vec<Label>>,
    /// Ranges in which a node's announced prefixes are reached in clear while the tunnel to it is
    /// down. An absent key keeps the stored ranges.
    #[serde(deserialize_with = "from_texts")]
    pub bypass_when_down: Option<Vec<IpNet>>,
    /// Time that a node may be offline before other nodes may take over its prefixes, at least 10 s;
    /// for example `10m` or `1h 30m`.
    #[serde(deserialize_with = "from_text")]
    pub lease: Option<SignedDuration>,
    /// Settings of the log.
    pub log: Option<LogConfig>,
    /// Settings of the metrics.
    pub metrics: MetricsSettings,
    /// Settings of the web page.
    pub ui: UiSettings,
    /// Second port of the STUN server, by which `towline netcheck` finds out how a NAT filters (RFC 5780).
    pub stun: StunSettings,
    /// How to reach the etcd cluster that `store` names.
    pub etcd: EtcdTable,
}

/// Settings of the etcd cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EtcdTable {
    /// PEM file with the CA certificates that sign the certificates of the members. Without it, the members must
    /// be on this machine, unless `plaintext` is set.
    pub ca: Option<PathBuf>,
    /// PEM file with the client certificate, where etcd asks for one. `key` is needed too.
    pub certificate: Option<PathBuf>,
    /// PEM file with the private key of the client certificate.
    pub key: Option<PathBuf>,
    /// User to log in as, where etcd has authentication enabled. It needs the permission to read and write the
    /// keys of the prefix.
    pub user: Option<String>,
    /// File with the password of the user.
    pub password_file: Option<PathBuf>,
    /// Connect to other machines without TLS. Anyone on the network path can then read the store and replace it by an
    /// earlier one.
    pub plaintext: bool,
    /// Several controllers serve the mesh at a time. It must be the same in all of them. Without it, one serves, and
    /// the others wait until it ends.
    pub shared: bool,
}

/// Settings of the metrics for Prometheus.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsSettings {
    /// Address at which Prometheus reads `GET /metrics`, and probes ask `GET /healthz` and `GET /readyz`, without
    /// TLS and login. Absent or empty: nothing is served.
    #[serde(deserialize_with = "address")]
    pub listen: Option<SocketAddr>,
}

/// Parses an address. A template that has none for it writes an empty text.
fn address<'de, D>(deserializer: D) -> Result<Option<SocketAddr>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    let text = String::deserialize(deserializer)?;
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(serde::de::Error::custom)
}

/// Settings of the web page.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UiSettings {
    /// Address on which the controller serves a read-only web page of the mesh, for example
    /// `127.0.0.1:7480`. There is no TLS and no login, so an address that other machines reach is refused
    /// unless `allow_remote` is set. Without it, there is no page.
    pub listen: Option<SocketAddr>,
    /// Allows an address that is not of the loopback, for example one of the overlay or one behind a
    /// proxy that asks for a login. Everybody who reaches it sees names, sites and events of the mesh.
    pub allow_remote: Option<bool>,
    /// Host names by which browsers may call the page, for example that of a proxy. IP addresses and
    /// `localhost` are always accepted; other names are refused, so that no other web site can read
    /// the page through a browser.
    pub hosts: Option<Vec<String>>,
}

/// Settings of the STUN server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StunSettings {
    /// Second UDP port, for example 7444, which machines on the internet must reach like the first one. The
    /// server answers from there if it is asked to. Without it, the server answers only from the address and
    /// port that was asked.
    pub other_port: Option<NonZeroU16>,
    /// Public addresses of this machine, two of a family, for example `["203.0.113.10", "203.0.113.11"]`. The
    /// server answers from the other one if it is asked to, so that a NAT that filters by address is told from
    /// one that does not filter. Each must belong to a link of this machine. They need `other_port`, and
    /// `listen` must be every address.
    pub addresses: Option<Vec<IpAddr>>,
}

fn from_text<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: Display>,
{
    parse(&String::deserialize(deserializer)?).map(Some)
}

fn from_texts<'de, D, T>(deserializer: D) -> Result<Option<Vec<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: Display>,
{
    let texts = <Vec<String>>::deserialize(deserializer)?;
    texts.iter().map(|text| parse(text)).collect::<Result<_, _>>().map(Some)
}

fn parse<T: FromStr<Err: Display>, E: serde::de::Error>(text: &str) -> Result<T, E> {
    text.parse().map_err(|error| E::custom(format_args!("`{text}`: {error}")))
}

/// Error of reading or checking the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read or parsed.
    #[error(transparent)]
    File(#[from] FileError),
    /// A setting has an invalid value.
    #[error("{setting}: {why}")]
    Setting {
        /// Name of the setting.
        setting: &'static str,
        /// Description of the error, and of a valid value.
        why: String,
    },
}

impl Settings {
    /// Reads a configuration file: `named`, or [`FILE`], which may be absent.
    pub fn read(named: Option<&Path>) -> Result<Self, ConfigError> {
        match config_file::read(named, Path::new(FILE))? {
            Some((path, text)) => Ok(config_file::parse(&text, path)?),
            None => Ok(Self::default()),
        }
    }

    /// Returns these settings, with absent ones taken from `below`.
    #[must_use]
    pub fn or(self, below: Self) -> Self {
        Self {
            state_dir: self.state_dir.or(below.state_dir),
            store: self.store.or(below.store),
            listen: self.listen.or(below.listen),
            advertise: self.advertise.or(below.advertise),
            remote_admin: self.remote_admin.or(below.remote_admin),
            overlay_v6: self.overlay_v6.or(below.overlay_v6),
            overlay_v4: self.overlay_v4.or(below.overlay_v4),
            protected: self.protected.or(below.protected),
            trusted_sites: self.trusted_sites.or(below.trusted_sites),
            bypass_when_down: self.bypass_when_down.or(below.bypass_when_down),
            lease: self.lease.or(below.lease),
            log: self.log.or(below.log),
            metrics: MetricsSettings { listen: self.metrics.listen.or(below.metrics.listen) },
            ui: UiSettings {
                listen: self.ui.listen.or(below.ui.listen),
                allow_remote: self.ui.allow_remote.or(below.ui.allow_remote),
                hosts: self.ui.hosts.or(below.ui.hosts),
            },
            stun: StunSettings {
                other_port: self.stun.other_port.or(below.stun.other_port),
                addresses: self.stun.addresses.or(below.stun.addresses),
            },
            etcd: EtcdTable {
                ca: self.etcd.ca.or(below.etcd.ca),
                certificate: self.etcd.certificate.or(below.etcd.certificate),
                key: self.etcd.key.or(below.etcd.key),
                user: self.etcd.user.or(below.etcd.user),
                password_file: self.etcd.password_file.or(below.etcd.password_file),
                plaintext: self.etcd.plaintext || below.etcd.plaintext,
                shared: self.etcd.shared || below.etcd.shared,
            },
        }
    }

    /// Returns the state directory, for commands that call a running controller.
    pub fn state_dir(&self) -> PathBuf {
        self.state_dir.clone().unwrap_or_else(|| STATE_DIR.into())
    }

    /// Returns the location of the store.
    pub fn location(&self) -> Result<Location, ConfigError> {
        let table = &self.etcd;
        let invalid = |setting: &'static str, why: String| ConfigError::Setting { setting, why };
        let Some(text) = self.store.as_deref() else {
            if *table != EtcdTable::default() {
                return Err(invalid("etcd", format!("`store` does not begin with {SCHEME}")));
            }
            return Ok(Location::File);
        };
        if text == FILE_STORE {
            return Ok(Location::File);
        }
        let url =
            EtcdUrl::parse(text).map_err(|error: UrlError| invalid("store", error.to_string()))?;
        let client = match (&table.certificate, &table.key) {
            (Some(certificate), Some(key)) => {
                Some(CertificateFiles { certificate: certificate.clone(), key: key.clone() })
            }
            (None, None) => None,
            _ => return Err(invalid("etcd", "`certificate` and `key` need each other".into())),
        };
        let tls = table.ca.clone().map(|ca| TlsFiles { ca, client: client.clone() });
        if tls.is_none() && client.is_some() {
            return Err(invalid("etcd", "`certificate` needs `ca`".into()));
        }
        if tls.is_none() && !table.plaintext && !url.is_loopback() {
            let why = "without `ca` it would be reached in clear: name the CA of its certificates";
            return Err(invalid("etcd", why.into()));
        }
        let login = match (&table.user, &table.password_file) {
            (Some(user), Some(password)) if !user.is_empty() => {
                Some(LoginFile { user: user.clone(), password: password.clone() })
            }
            (None, None) => None,
            _ => return Err(invalid("etcd", "`user` and `password_file` need each other".into())),
        };
        Ok(Location::Etcd(EtcdSettings { url, tls, login, is_shared: table.shared }))
    }

    /// Checks the settings, applies defaults to absent ones, and returns the configuration.
    pub fn resolve(self) -> Result<Config, ConfigError> {
        let invalid = |setting: &'static str, why: String| ConfigError::Setting { setting, why };
        let (state_dir, store) = (self.state_dir(), self.location()?);
        let listen = match self.listen {
            Some(listen) => listen,
            None => LISTEN.parse().map_err(|_| invalid("listen", "no default".into()))?,
        };
        let advertise = self.advertise.unwrap_or_default();
        if advertise.len() > limits::CONTROLLERS {
            let why = format!("too many addresses: a token holds at most {}", limits::CONTROLLERS);
            return Err(invalid("advertise", why));
        }
        // A controller that listens on one specific address advertises it by default.
        let advertise =
            if advertise.is_empty() && !listen.ip().is_unspecified() && listen.port() != 0 {
                listen.to_string().parse().map(|address| vec![address]).unwrap_or_default()
            } else {
                advertise
            };
        if let Some(v6) = self.overlay_v6
            && (v6.trunc() != v6 || v6.prefix_len() > 112)
        {
            return Err(invalid(
                "overlay-v6",
                format!("{v6} must have no host bits, and a prefix length of 112 or less"),
            ));
        }
        if let Some(v4) = self.overlay_v4
            && (v4.trunc() != v4 || v4.prefix_len() > 29)
        {
            return Err(invalid(
                "overlay-v4",
                format!("{v4} must have no host bits, and a prefix length of 29 or less"),
            ));
        }
        for (setting, ranges) in
            [("protected", &self.protected), ("bypass-when-down", &self.bypass_when_down)]
        {
            check_ranges(ranges.as_deref().unwrap_or_default())
                .map_err(|why| invalid(setting, why))?;
        }
        if self.trusted_sites.as_ref().is_some_and(|sites| sites.len() > limits::TRUSTED_SITES) {
            let why = format!("too many sites: at most {} can be trusted", limits::TRUSTED_SITES);
            return Err(invalid("trusted-sites", why));
        }
        let lease = match self.lease.map(Duration::try_from) {
            None => None,
            Some(Ok(lease)) if (10..=u64::from(u32::MAX)).contains(&lease.as_secs()) => Some(lease),
            Some(_) => {
                return Err(invalid("lease", "too short or too long: use at least 10s".into()));
            }
        };
        let mesh = MeshSettings {
            overlay_v6: self.overlay_v6,
            overlay_v4: self.overlay_v4,
            protected: self.protected,
            trusted_sites: self.trusted_sites,
            bypass_when_down: self.bypass_when_down,
            lease,
        };
        let metrics = self.metrics.listen;
        if metrics.is_some_and(|address| address.port() == 0) {
            return Err(invalid("metrics-listen", "use a port of 1 to 65535".into()));
        }
        let ui = self.ui.resolve().map_err(|(setting, why)| invalid(setting, why))?;
        let stun = self.stun.resolve(listen).map_err(|why| invalid("stun", why))?;
        Ok(Config {
            state_dir,
            credentials: credentials(),
            store,
            listen,
            advertise,
            mesh,
            heartbeat: HEARTBEAT,
            metrics,
            ui,
            stun,
            remote_admin: self.remote_admin.unwrap_or(false),
            migrate_store: false,
        })
    }
}

impl UiSettings {
    /// Returns the configuration of the page, or the setting that is invalid and why.
    fn resolve(self) -> Result<Option<UiConfig>, (&'static str, String)> {
        let Some(listen) = self.listen else { return Ok(None) };
        if listen.port() == 0 {
            return Err(("ui", "use a port of 1 to 65535".into()));
        }
        if !listen.ip().to_canonical().is_loopback() && self.allow_remote != Some(true) {
            let why = format!(
                "{listen} can be reached by other machines, and the page has no login: use 127.0.0.1:{} \
                 and `ssh -L`, or set `allow_remote = true` in [ui]",
                listen.port()
            );
            return Err(("ui", why));
        }
        let hosts = self.hosts.unwrap_or_default();
        let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.' || c == '_';
        if let Some(host) = hosts.iter().find(|host| host.is_empty() || !host.chars().all(is_part))
        {
            return Err((
                "ui.hosts",
                format!("`{host}` is not a host name: give it without a port"),
            ));
        }
        let hosts = hosts.iter().map(|host| host.to_ascii_lowercase()).collect();
        Ok(Some(UiConfig { listen, hosts }))
    }
}

impl StunSettings {
    /// Returns the configuration of the second port, or why it is invalid.
    fn resolve(self, listen: SocketAddr) -> Result<Option<StunConfig>, String> {
        let addresses = self.addresses.unwrap_or_default();
        let Some(other_port) = self.other_port else {
            return match addresses.is_empty() {
                true => Ok(None),
                false => Err("`addresses` needs `other_port`".into()),
            };
        };
        if other_port.get() == listen.port() {
            return Err(format!("`other_port` must differ from {other_port}, that of `listen`"));
        }
        if !addresses.is_empty() && !listen.ip().is_unspecified() {
            return Err("`addresses` needs that `listen` is every address, as [::]:7443 is".into());
        }
        if addresses.len() > STUN_ADDRESSES {
            return Err(format!("too many addresses: use at most {STUN_ADDRESSES}"));
        }
        // The kernel lets a socket be bound to these, too.
        let is_of_no_host = |ip: &&IpAddr| ip.is_unspecified() || ip.is_multicast();
        if let Some(ip) = addresses.iter().find(is_of_no_host) {
            return Err(format!("{ip} in `addresses` is not the address of a machine"));
        }
        Ok(Some(StunConfig { other_port, addresses }))
    }
}

/// Returns the directory of the credentials that systemd passes to this process, if it passes any.
pub fn credentials() -> Option<PathBuf> {
    std::env::var_os(CREDENTIALS).map(PathBuf::from)
}

/// Checks that a mesh configuration can hold these ranges.
pub fn check_ranges(ranges: &[IpNet]) -> Result<(), String> {
    if ranges.len() > limits::PREFIXES {
        return Err(format!("too many ranges: use at most {}", limits::PREFIXES));
    }
    match ranges.iter().find(|net| net.trunc() != **net) {
        Some(net) => Err(format!("{net} has host bits set: use {}", net.trunc())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use towline_service::log::LogFormat;

    use super::*;

    fn parse(text: &str) -> Result<Settings, ConfigError> {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("controller.toml");
        std::fs::write(&path, text).unwrap();
        Settings::read(Some(&path))
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let file =
            parse("listen = \"127.0.0.1:1\"\nlease = \"5m\"\nadvertise = [\"a:1\"]").unwrap();
        let flags =
            Settings { listen: Some("127.0.0.1:2".parse().unwrap()), ..Settings::default() };
        let config = flags.or(file).resolve().unwrap();
        assert_eq!(config.listen, "127.0.0.1:2".parse().unwrap());
        assert_eq!(config.mesh.lease, Some(Duration::from_secs(300)));
        assert_eq!(config.advertise.len(), 1);
        assert_eq!(config.state_dir, Path::new(STATE_DIR));
    }

    #[test]
    fn the_example_says_what_the_defaults_are() {
        let example = parse(include_str!("../../deploy/controller.toml")).unwrap();
        let example = example.resolve().unwrap();
        let default = Settings::default().resolve().unwrap();
        assert_eq!(example.state_dir, default.state_dir);
        assert_eq!(example.listen, default.listen);
        assert_eq!(example.mesh.overlay_v4, Some(OVERLAY_V4.parse().unwrap()));
        assert_eq!(example.mesh.lease, Some(LEASE));
        assert_eq!(example.metrics, None);
        assert_eq!(example.ui, None);
        assert_eq!(example.stun, None);
        assert_eq!(example.remote_admin, default.remote_admin);
        assert_eq!(example.mesh.protected, Some(Vec::new()));
    }

    #[test]
    fn the_format_of_the_log_is_text_or_json() {
        let format = |text: &str| parse(text).unwrap().log.unwrap_or_default().format;
        assert_eq!(format(""), LogFormat::Text);
        assert_eq!(format("[log]\nformat = \"json\""), LogFormat::Json);
        assert!(parse("[log]\nformat = \"xml\"").unwrap_err().to_string().contains("line 2"));
    }

    #[test]
    fn other_machines_reach_the_page_only_if_that_is_allowed() {
        let page = |text: &str| parse(&format!("[ui]\n{text}")).unwrap().resolve().unwrap().ui;
        assert_eq!(page(""), None);
        for loopback in ["127.0.0.1:7480", "[::1]:7480", "[::ffff:127.0.0.1]:7480"] {
            let found = page(&format!("listen = \"{loopback}\"")).unwrap();
            assert_eq!(found.listen, loopback.parse().unwrap());
        }
        let remote =
            "listen = \"198.19.0.1:7480\"\nallow_remote = true\nhosts = [\"Mesh.example\"]";
        assert_eq!(page(remote).unwrap().hosts, ["mesh.example"]);
    }

    #[test]
    fn the_stun_server_has_a_second_port_only_if_that_is_configured() {
        let stun = |text: &str| parse(text).unwrap().resolve().unwrap().stun;
        assert_eq!(stun(""), None);
        assert_eq!(stun("[stun]"), None);
        let port = stun("listen = \"192.0.2.1:7443\"\n[stun]\nother_port = 7444").unwrap();
        assert_eq!((port.other_port.get(), port.addresses), (7_444, Vec::new()));
        let text = "[stun]\nother_port = 7444\naddresses = [\"192.0.2.1\", \"192.0.2.2\"]";
        assert_eq!(stun(text).unwrap().addresses.len(), 2);
    }

    #[test]
    fn etcd_is_reached_with_tls_and_without_it_on_this_machine_alone() {
        let location = |text: &str| parse(text).unwrap().location();
        assert_eq!(location("").unwrap(), Location::File);
        assert_eq!(location("store = \"file\"").unwrap(), Location::File);
        let etcd = |text: &str| match location(text).unwrap() {
            Location::Etcd(settings) => settings,
            Location::File => panic!("{text}"),
        };
        assert_eq!(etcd("store = \"etcd://127.0.0.1:2379\"").tls, None);
        let settings = etcd(
            "store = \"etcd://a:2379,b:2379/prod\"\n[etcd]\nca = \"/ca\"\ncertificate = \"/c\"\n\
             key = \"/k\"\nuser = \"u\"\npassword_file = \"/p\"",
        );
        assert_eq!(settings.url.to_string(), "etcd://a:2379,b:2379/prod");
        assert_eq!(settings.tls.unwrap().client.unwrap().key, Path::new("/k"));
        assert_eq!(settings.login.unwrap().user, "u");
        assert_eq!(etcd("store = \"etcd://a:2379\"\n[etcd]\nplaintext = true").tls, None);
        let shipped = etcd(include_str!("../../deploy/etcd/controller.toml"));
        assert_eq!(shipped.url.endpoints().len(), 3);
        assert!(shipped.tls.unwrap().client.is_some());
        for (text, words) in [
            ("store = \"etcd://a:2379\"", "in clear"),
            ("store = \"etcd://u:secret@a:2379\"", "password_file"),
            ("store = \"redis://secret\"", "etcd://"),
            ("[etcd]\nca = \"/ca\"", "does not begin with etcd://"),
            ("store = \"etcd://127.0.0.1:1\"\n[etcd]\nkey = \"/k\"", "need each other"),
            ("store = \"etcd://127.0.0.1:1\"\n[etcd]\nuser = \"u\"", "need each other"),
        ] {
            let error = location(text).unwrap_err().to_string();
            assert!(error.contains(words) && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_concrete_listen_address_is_advertised_where_nothing_else_is_said() {
        let listen = |text: &str| {
            let settings = Settings { listen: Some(text.parse().unwrap()), ..Settings::default() };
            let advertise = settings.resolve().unwrap().advertise;
            advertise.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(listen("192.0.2.1:7443"), ["192.0.2.1:7443"]);
        assert_eq!(listen("[2001:db8::1]:7443"), ["[2001:db8::1]:7443"]);
        assert!(listen("[::]:7443").is_empty());
    }

    #[test]
    fn what_is_wrong_is_told_in_one_line() {
        let line = |result: Result<Config, ConfigError>| {
            let text = result.unwrap_err().to_string();
            assert!(!text.contains('\n'), "{text}");
            text
        };
        let of = |text: &str| line(parse(text).and_then(Settings::resolve));
        assert!(of("\nlissten = 1").contains("line 2: unknown field `lissten`"));
        assert!(of("listen = \"nowhere\"").contains("line 1"));
        assert!(of("advertise = [\"nowhere\"]").contains("host:port"));
        assert!(of("overlay_v4 = \"198.19.0.0/31\"").contains("overlay-v4"));
        assert!(of("overlay_v6 = \"fd00::1/64\"").contains("overlay-v6"));
        assert!(of("protected = [\"10.0.0.1/8\"]").contains("10.0.0.0/8"));
        assert!(of("lease = \"1s\"").contains("lease"));
        assert!(of("[metrics]\nlisten = \"127.0.0.1:0\"").contains("metrics-listen"));
        assert!(of("[ui]\nlisten = \"127.0.0.1:0\"").contains("ui: "));
        assert!(of("[ui]\nlisten = \"0.0.0.0:7480\"").contains("allow_remote"));
        assert!(of("[ui]\nlisten = \"[::1]:1\"\nhosts = [\"a:1\"]").contains("ui.hosts"));
        assert!(of("[metrics]\nlisten = \"9587\"").contains("address"));
        assert!(of("[stun]\nother_port = 0").contains("line 2"));
        assert!(of("[stun]\nother_port = 7443").contains("must differ"));
        assert!(of("[stun]\naddresses = [\"192.0.2.1\"]").contains("needs `other_port`"));
        let one =
            "listen = \"192.0.2.1:7443\"\n[stun]\nother_port = 7444\naddresses = [\"192.0.2.2\"]";
        assert!(of(one).contains("every address"));
        let all = "[stun]\nother_port = 7444\naddresses = [\"0.0.0.0\"]";
        assert!(of(all).contains("of a machine"));
        let missing = Settings::read(Some(Path::new("/nonexistent/x.toml"))).unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/x.toml"));
    }
}
