//! Writes `docs/configuration.md` from the structs that the configuration files are parsed into, and
//! checks its keys against those that the parsers accept.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::Value;
use towline_controller::config as controller_config;

use super::rust::{Field, Item, inner, item, items};
use super::{NOTE, compare, header, root, row};

/// Types of values, each with its form in TOML.
const SCALARS: &[(&str, &str)] = &[
    ("ClearSetting", "`\"trusted_sites\"`, `\"bypass_when_down\"`"),
    ("ControllerAddress", "`\"host:port\"`"),
    ("IpAddr", "IP address"),
    ("IpNet", "network"),
    ("Ipv4Net", "IPv4 network"),
    ("Ipv6Net", "IPv6 network"),
    ("Label", "string"),
    ("MetricsAddress", "`\"address:port\"` or `\"overlay:port\"`"),
    ("Mtu", "integer"),
    ("NodeName", "string"),
    ("NonZeroU16", "integer"),
    ("OtlpEndpoint", "`\"http://address:port\"`"),
    ("PathBuf", "path"),
    ("SealAhead", "`\"auto\"`, `\"off\"` or integer"),
    ("SignedDuration", "duration"),
    ("SocketAddr", "`\"address:port\"`"),
    ("String", "string"),
    ("WireguardKey", "string"),
    ("bool", "boolean"),
    ("std::net::SocketAddr", "`\"address:port\"`"),
    ("u16", "integer"),
    ("u32", "integer"),
    ("u64", "integer"),
    ("usize", "integer"),
];

/// A configuration file, and the struct that it is parsed into.
struct File {
    name: &'static str,
    introduction: &'static str,
    root: Item,
    /// Value of each key of an empty file; keys without one are absent.
    defaults: Value,
    /// Returns the error of a text, empty if there is none.
    error: fn(&str) -> String,
}

fn agent() -> File {
    File {
        name: "agent.toml",
        introduction: "The agent reads `/etc/towline/agent.toml`. `--config` and `TOWLINE_CONFIG` name \
                       another file. `towline config check` checks it, `towline config show` prints it \
                       with all defaults, and `systemctl reload towline` applies changes of `[node]`, \
                       `[controller]`, `[trust]` and `[[peer]]`; other changes need a restart of the agent. \
                       [deploy/agent.toml](../deploy/agent.toml) is a file with every key.",
        root: item("agent/src/config/mod.rs", "Config"),
        defaults: serde_json::to_value(towline_agent::config::Config::default()).expect("JSON"),
        error: |text| {
            let parsed = towline_agent::config::Config::parse(text, Path::new("agent.toml"));
            parsed.err().map(|error| error.to_string()).unwrap_or_default()
        },
    }
}

fn controller() -> File {
    File {
        name: "controller.toml",
        introduction: "The controller reads `/etc/towline/controller.toml`. `--config` and \
                       `TOWLINE_CONTROLLER_CONFIG` name another file. `towline-controller config check` \
                       checks it; changes need a restart of the controller. \
                       [deploy/controller.toml](../deploy/controller.toml) is a file with every key.",
        root: item("controller/src/config.rs", "Settings"),
        defaults: serde_json::json!({
            "state_dir": controller_config::STATE_DIR,
            "store": controller_config::FILE_STORE,
            "listen": controller_config::LISTEN,
            "overlay_v4": controller_config::OVERLAY_V4,
            "lease": towline_service::output::span(controller_config::LEASE),
            "log": towline_service::log::LogConfig::default(),
            "etcd": { "plaintext": false, "shared": false },
        }),
        error: |text| {
            let file = tempfile::NamedTempFile::new().expect("a file");
            std::fs::write(file.path(), text).expect("a writable file");
            let parsed = controller_config::Settings::read(Some(file.path()));
            parsed.err().map(|error| error.to_string()).unwrap_or_default()
        },
    }
}

/// Returns the struct or enum of this name that is parsed from a file: it forbids unknown keys, or its
/// variants have names in kebab case.
fn parsed(name: &str) -> Option<&'static Item> {
    static ALL: OnceLock<Vec<Item>> = OnceLock::new();
    let all = ALL.get_or_init(|| {
        let mut waiting: Vec<PathBuf> =
            ["agent", "controller", "proto"].map(|top| root().join(top)).into();
        let mut found = Vec::new();
        while let Some(directory) = waiting.pop() {
            for entry in std::fs::read_dir(&directory).expect("a readable directory") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    waiting.push(path);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    found.extend(items(&std::fs::read_to_string(&path).expect("a readable file")));
                }
            }
        }
        found
    });
    all.iter().find(|item| {
        let mark = if item.is_enum { "rename_all = \"kebab-case\"" } else { "deny_unknown_fields" };
        item.name == name && item.attributes.contains(mark)
    })
}

/// Form of a key's value.
enum Form {
    /// A value, with its type in words.
    Value(String),
    /// A table of the file, `[name]`.
    Section(&'static Item),
    /// Tables of the file that can be repeated, `[[name]]`.
    Sections(&'static Item),
}

fn form(kind: &str) -> Form {
    let kind = inner(kind, "Option").unwrap_or(kind);
    let (one, is_list) = match inner(kind, "Vec") {
        Some(one) => (one, true),
        None => (kind, false),
    };
    let text = match (SCALARS.iter().find(|(name, _)| *name == one), parsed(one)) {
        (Some((_, text)), _) => (*text).to_owned(),
        (None, Some(item)) if item.is_enum => {
            let names = item.fields.iter().map(|variant| format!("`\"{}\"`", variant.kebab()));
            names.collect::<Vec<_>>().join(", ")
        }
        (None, Some(item)) if is_list => return Form::Sections(item),
        (None, Some(item)) => return Form::Section(item),
        (None, None) => panic!("add the form of `{one}` in TOML to SCALARS in this file"),
    };
    Form::Value(if is_list { format!("array: {text}") } else { text })
}

/// Returns the meaning of a key: its doc comment, and those of the values of an enum.
fn meaning(field: &Field) -> String {
    let kind = inner(&field.kind, "Option").unwrap_or(&field.kind);
    let mut text = field.doc.clone();
    if let Some(item) = parsed(kind).filter(|item| item.is_enum) {
        for variant in &item.fields {
            text += &format!(" `{}`: {}", variant.kebab(), variant.doc);
        }
    }
    text
}

/// Returns the default of a key. In a section that can be repeated there are no values.
fn default(field: &Field, defaults: Option<&Value>) -> String {
    let value = defaults.and_then(|defaults| defaults.get(field.key()));
    if let Some(value) = value.filter(|value| !value.is_null()) {
        return format!("`{value}`");
    }
    let is_optional = inner(&field.kind, "Option").is_some();
    match defaults {
        None if field.attributes.contains("default") && !is_optional => "`[]`".to_owned(),
        None if !is_optional => "must be set".to_owned(),
        _ => String::new(),
    }
}

fn table(item: &Item, defaults: Option<&Value>) -> String {
    let mut text = String::new();
    for field in &item.fields {
        assert!(!field.doc.is_empty(), "{}.{} has no doc comment", item.name, field.name);
        if let Form::Value(kind) = form(&field.kind) {
            text += &row(&[
                &format!("`{}`", field.key()),
                &kind,
                &default(field, defaults),
                &meaning(field),
            ]);
        }
    }
    if text.is_empty() { text } else { header(&["key", "type", "default", "meaning"]) + &text }
}

fn chapter(file: &File) -> String {
    let File { name, introduction, root, defaults, .. } = file;
    let mut text = format!("\n## {name}\n\n{introduction}\n\n{}", table(root, Some(defaults)));
    for field in &root.fields {
        let key = field.key();
        let (title, item, defaults) = match form(&field.kind) {
            Form::Value(_) => continue,
            Form::Section(item) => (format!("[{key}]"), item, defaults.get(&key)),
            Form::Sections(item) => (format!("[[{key}]]"), item, None),
        };
        text += &format!("\n### `{title}` of {name}\n\n{}\n\n{}", field.doc, table(item, defaults));
    }
    text
}

fn document() -> String {
    let chapters = [agent(), controller()].map(|file| chapter(&file));
    format!(
        "# Configuration\n{NOTE}\n\nBoth programs read a file in TOML. Every key has a default, so that an \
         empty or absent file works. An unknown key is an error that names the key and its line. Flags \
         override environment variables ([cli.md](cli.md)), and these override the file.\n{}",
        chapters.concat()
    )
}

/// Returns the keys that the parser knows at a place, which its error about another key lists.
fn accepted(error: &str) -> BTreeSet<String> {
    let (_, listed) = error.split_once("expected").unwrap_or_else(|| panic!("no list: {error}"));
    listed.split('`').skip(1).step_by(2).map(ToOwned::to_owned).collect()
}

fn documented(item: &Item) -> BTreeSet<String> {
    item.fields.iter().map(Field::key).collect()
}

#[test]
fn the_document_describes_every_key() {
    compare("docs/configuration.md", &document());
}

#[test]
fn the_keys_are_those_that_the_parsers_accept() {
    for File { name, root, error, .. } in [agent(), controller()] {
        let at = |place: &str| accepted(&error(&format!("{place}\nno_such_key = 1\n")));
        assert_eq!(documented(&root), at(""), "{name}");
        for field in &root.fields {
            let key = field.key();
            let (place, item) = match form(&field.kind) {
                Form::Value(_) => continue,
                Form::Section(item) => (format!("[{key}]"), item),
                Form::Sections(item) => (format!("[[{key}]]"), item),
            };
            assert_eq!(documented(item), at(&place), "{place} of {name}");
        }
    }
}

#[test]
fn the_defaults_are_those_of_keys_that_exist() {
    for File { name, root, defaults, .. } in [agent(), controller()] {
        for key in defaults.as_object().expect("an object").keys() {
            assert!(documented(&root).contains(key), "{key} of {name}");
        }
    }
}
