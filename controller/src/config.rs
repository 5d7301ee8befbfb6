//! Configuration of the controller: flags override the environment, which overrides the file. All
//! of it is parsed before any file or socket is opened.

use std::fmt::Display;
use std::net::SocketAddr;
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

/// Configuration file that is read if `--config` is not given. It need not exist.
pub const FILE: &str = "/etc/towline/controller.toml";
/// Default state directory.
pub const STATE_DIR: &str = "/var/lib/towline-controller";
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

/// Complete configuration of the controller, with defaults applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// State directory.
    pub state_dir: PathBuf,
    /// Listening address.
    pub listen: SocketAddr,
    /// Addresses of the controllers that are written into tokens. At the first start they become the
    /// mesh's list of controllers.
    pub advertise: Vec<ControllerAddress>,
    /// Settings of the mesh.
    pub mesh: MeshSettings,
    /// Interval at which each side of a watch sends a heartbeat.
    pub heartbeat: Duration,
    /// Address at which `GET /metrics` is answered, without TLS and login. `None`: nowhere.
    pub metrics: Option<SocketAddr>,
    /// True if administrators may also come over the network, with a certificate.
    pub remote_admin: bool,
    /// True if records of the store that are not authenticated are taken at this start, and authenticated.
    pub migrate_store: bool,
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
    /// Address on which the controller listens. The default is every address of both families, or of
    /// IPv4 alone where the machine has no IPv6.
    pub listen: Option<SocketAddr>,
    /// Addresses, each `host:port`, at which nodes reach the controller. They are written into the
    /// tokens, and at the first start they become the mesh's list of controllers. Empty: the listening
    /// address, if that is a single one.
    #[serde(deserialize_with = "from_texts")]
    pub advertise: Option<Vec<ControllerAddress>>,
    /// True if administrators may also come over the network, with the certificate `admin.crt` and its key. By
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
}

/// Settings of the metrics for Prometheus.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsSettings {
    /// Address at which Prometheus reads `GET /metrics`, without TLS and login. Without it, there are no
    /// metrics.
    pub listen: Option<SocketAddr>,
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
        }
    }

    /// Returns the state directory, for commands that call a running controller.
    pub fn state_dir(&self) -> PathBuf {
        self.state_dir.clone().unwrap_or_else(|| STATE_DIR.into())
    }

    /// Checks the settings, applies defaults to absent ones, and returns the configuration.
    pub fn resolve(self) -> Result<Config, ConfigError> {
        let invalid = |setting: &'static str, why: String| ConfigError::Setting { setting, why };
        let state_dir = self.state_dir();
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
        Ok(Config {
            state_dir,
            listen,
            advertise,
            mesh,
            heartbeat: HEARTBEAT,
            metrics,
            remote_admin: self.remote_admin.unwrap_or(false),
            migrate_store: false,
        })
    }
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
        let missing = Settings::read(Some(Path::new("/nonexistent/x.toml"))).unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/x.toml"));
    }
}
