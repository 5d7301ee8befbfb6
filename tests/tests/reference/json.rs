//! Writes `docs/json.md`, the fields of what the commands print with `-o json`: from the schema of the
//! agent's socket, with its comments, and from the structs that are printed.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use towline_proto::pb;
use towline_proto::status::SCHEMA_VERSION;

use super::cli::{built, name, shown};
use super::rust::{Field, inner, item};
use super::{NOTE, compare, header, read, row};

/// Description of a value that is printed.
#[derive(Clone, Copy)]
enum Source {
    /// A message of the schema.
    Schema(&'static str),
    /// A struct in a file of the workspace.
    Struct(&'static str, &'static str),
}

/// A command that prints a document. After ` --` come flags that choose this document.
struct Document {
    command: &'static str,
    source: Source,
    /// True if the document is an array of such values.
    is_list: bool,
}

const fn one(command: &'static str, source: Source) -> Document {
    Document { command, source, is_list: false }
}

const fn list(command: &'static str, source: Source) -> Document {
    Document { command, source, is_list: true }
}

const DOCUMENTS: &[Document] = &[
    one("towline status", Source::Schema("StatusResponse")),
    list("towline peers", Source::Schema("PeerStatus")),
    one("towline peer", Source::Schema("PeerResponse")),
    list("towline events", Source::Schema("Event")),
    one("towline ping", Source::Struct("agent/src/cli/ping.rs", "Report")),
    one("towline join", Source::Struct("agent/src/cli/join.rs", "Report")),
    one("towline join --install", Source::Struct("agent/src/cli/install.rs", "Report")),
    list("towline guard list", Source::Schema("GuardedNetwork")),
    one("towline node-ip", Source::Struct("agent/src/cli/guard.rs", "NodeIp")),
    one("towline version", Source::Struct("proto/src/status.rs", "Version")),
    one(
        "towline-controller token create",
        Source::Struct("controller/src/cli/token.rs", "Created"),
    ),
    list("towline-controller token list", Source::Struct("controller/src/cli/token.rs", "View")),
    list("towline-controller node list", Source::Struct("controller/src/cli/node.rs", "View")),
    one("towline-controller node show", Source::Struct("controller/src/cli/node.rs", "View")),
    one("towline-controller mesh show", Source::Struct("controller/src/cli/mesh.rs", "View")),
    list(
        "towline-controller mesh status",
        Source::Struct("controller/src/tunnels/mod.rs", "NodeStatus"),
    ),
    list(
        "towline-controller mesh matrix",
        Source::Struct("controller/src/tunnels/mod.rs", "TunnelStatus"),
    ),
    list("towline-controller mesh events", Source::Schema("Event")),
    list("towline-controller admin list", Source::Struct("controller/src/cli/admin.rs", "View")),
    one("towline-controller version", Source::Struct("proto/src/status.rs", "Version")),
];

/// Commands whose documents `docs/diagnosis.md` describes.
const DIAGNOSES: &[&str] =
    &["towline doctor", "towline explain", "towline netcheck", "towline trace"];

/// Types of Rust that are printed as text or as numbers.
const SCALARS: &[(&str, &str)] = &[
    ("&'a str", "string"),
    ("&'static str", "string"),
    ("Addressing", "string"),
    ("BTreeMap<String, String>", "object with a string for each key"),
    ("CandidateKind", "string"),
    ("IdentityKey", "string"),
    ("IpAddr", "string"),
    ("MeshId", "string"),
    ("NodeId", "string"),
    ("SocketAddr", "string"),
    ("String", "string"),
    ("bool", "boolean"),
    ("f64", "number"),
    ("u16", "number"),
    ("u32", "number"),
    ("u64", "number"),
    ("usize", "number"),
];

/// A row of the document.
struct Row {
    name: String,
    kind: String,
    meaning: String,
}

/// Messages of the schema that need a table of their own, in the order in which they were found.
type References = Vec<&'static str>;

/// Messages that may be parts of a document.
const PARTS: &[&str] = &[
    "ApiEndpointStatus",
    "ApiServerStatus",
    "Candidate",
    "ControllerStatus",
    "Detail",
    "Feature",
    "KubernetesStatus",
    "PathStatus",
    "PeerChange",
    "PeerStatus",
    "PingResponse",
    "ReflectorStatus",
    "RelayStatus",
];

fn link(message: &str, references: &mut References) -> String {
    let part = PARTS.iter().find(|part| **part == message);
    let part = part.unwrap_or_else(|| panic!("add {message} to PARTS or to SCALARS in this file"));
    if !references.contains(part) {
        references.push(*part);
    }
    format!("[{part}](#{})", part.to_lowercase())
}

/// Returns the rows of a value.
fn rows(source: Source, references: &mut References) -> Vec<Row> {
    match source {
        // It is printed in the form that the core has of it.
        Source::Schema("Candidate") => {
            rows(Source::Struct("proto/types/src/node.rs", "Candidate"), references)
        }
        Source::Schema(message) => {
            let fields = schema_fields(message).into_iter();
            fields.map(|field| schema_row(message, &field, references)).collect()
        }
        Source::Struct(file, name) => {
            let mut found = Vec::new();
            for field in item(file, name).fields {
                if field.attributes.contains("serde(skip)") {
                    continue;
                }
                if field.attributes.contains("serde(flatten)") {
                    let inside = item(file, &field.kind).name;
                    assert_eq!(inside, "View", "{file}: a flattened struct");
                    found.extend(rows(Source::Struct(file, "View"), references));
                    continue;
                }
                found.push(struct_row(&field, references));
            }
            found
        }
    }
}

fn struct_row(field: &Field, references: &mut References) -> Row {
    Row {
        name: field.key(),
        kind: struct_kind(&field.kind, references),
        meaning: field.doc.clone(),
    }
}

fn struct_kind(kind: &str, references: &mut References) -> String {
    if let Some(one) = inner(kind, "Option") {
        return format!("{} or null", struct_kind(one, references));
    }
    if let Some(one) = inner(kind, "Vec") {
        return format!("array: {}", struct_kind(one, references));
    }
    match SCALARS.iter().find(|(name, _)| *name == kind) {
        Some((_, text)) => (*text).to_owned(),
        None => link(kind.trim_start_matches("pb::"), references),
    }
}

/// A field of a message.
struct SchemaField {
    /// `optional`, `repeated` or empty.
    label: String,
    kind: String,
    name: String,
    comment: String,
}

/// Returns the fields of a message of the schema, in the order of the file.
fn schema_fields(message: &str) -> Vec<SchemaField> {
    let schema =
        ["local", "signed"].map(|file| read(&format!("proto/proto/towline/v1/{file}.proto")));
    let schema = schema.join("\n");
    let begin = format!("\nmessage {message} {{\n");
    let (_, body) = schema.split_once(&begin).unwrap_or_else(|| panic!("no message {message}"));
    let (body, _) = body.split_once("\n}").expect("the end of a message");
    let mut found = Vec::new();
    let mut comment: Vec<&str> = Vec::new();
    for line in body.lines().map(str::trim) {
        if let Some(text) = line.strip_prefix("//") {
            comment.push(text.trim());
            continue;
        }
        if let Some((declared, _)) = line.split_once(" = ") {
            let words: Vec<&str> = declared.split(' ').collect();
            let (label, kind, name) = match words[..] {
                [label, kind, name] => (label, kind, name),
                [kind, name] => ("", kind, name),
                _ => panic!("{message}: {line}"),
            };
            found.push(SchemaField {
                label: label.to_owned(),
                kind: kind.to_owned(),
                name: name.to_owned(),
                comment: comment.join(" "),
            });
        }
        comment.clear();
    }
    found
}

/// Returns the functions that write fields in another form than their type has, by field, from the
/// schema's build script.
fn forms() -> BTreeMap<String, String> {
    let script = read("proto/build.rs");
    let (_, table) = script.split_once("const FORMS").expect("the table of forms");
    let (table, _) = table.split_once("];").expect("the end of the table");
    let rows =
        table.lines().filter_map(|line| line.trim().strip_prefix("(\"")?.strip_suffix("\"),"));
    let pairs = rows.filter_map(|row| row.split_once("\", \""));
    pairs.map(|(field, form)| (field.to_owned(), form.to_owned())).collect()
}

fn schema_row(message: &str, field: &SchemaField, references: &mut References) -> Row {
    let SchemaField { label, kind, name, comment } = field;
    let form = forms().remove(&format!("{message}.{name}"));
    let kind = match form.as_deref() {
        Some("text") => "string or null".to_owned(),
        Some("time" | "optional_time") => "time or null".to_owned(),
        Some("millis") => "time".to_owned(),
        Some("candidates") => format!("array: {}", link("Candidate", references)),
        Some("counters") => "object with a number for each key".to_owned(),
        Some(other) => panic!("{message}.{name}: describe the form `{other}` in this file"),
        None => {
            let (one, is_message) = match kind.as_str() {
                "string" => ("string".to_owned(), false),
                "bool" => ("boolean".to_owned(), false),
                "uint32" | "uint64" | "int64" | "double" => ("number".to_owned(), false),
                other => (link(other, references), true),
            };
            match label.as_str() {
                "repeated" => format!("array: {one}"),
                "" if !is_message => one,
                _ => format!("{one} or null"),
            }
        }
    };
    // Absent fields of the schema are null in JSON, and so are empty texts and times of 0 in these
    // forms.
    let mut meaning = comment.replace("Absent", "Null").replace("absent", "null");
    match form.as_deref() {
        Some("text") => meaning = meaning.replace("empty", "null"),
        Some("time" | "optional_time") => {
            meaning = meaning.replace(", in seconds since 1970", "").replace("; 0 if", "; null if");
        }
        Some("millis") => meaning = meaning.replace(", in milliseconds since 1970", ""),
        _ => {}
    }
    Row { name: name.clone(), kind, meaning }
}

fn table(rows: &[Row], what: &str) -> String {
    let mut text = header(&["field", "type", "meaning"]);
    for Row { name, kind, meaning } in rows {
        assert!(!meaning.is_empty(), "{what}: the field {name} has no comment");
        text += &row(&[&format!("`{name}`"), kind, meaning]);
    }
    text
}

fn document() -> String {
    let mut references = References::new();
    let mut text = format!(
        "# JSON and YAML\n{NOTE}\n\n`-o json` prints one document, and `-o yaml` the same one in YAML. \
         These are the fields of version {SCHEMA_VERSION}, which `towline version -o json` shows as \
         `schema_version`. It grows when a field is removed or changes its type or meaning. Fields may be \
         added without a new version: programs should ignore fields that they do not know. Times are text \
         after RFC 3339 in UTC. [troubleshooting.md](troubleshooting.md#by-code) explains every code. \
         Texts without a code are for people and may change.\n\n`-o wide` prints a table for people with \
         more columns than the usual one, in no fixed form.\n"
    );
    for Document { command, source, is_list } in DOCUMENTS {
        let what = if *is_list { "An array. Each element:" } else { "An object:" };
        let rows = rows(*source, &mut references);
        text += &format!("\n## {command}\n\n{what}\n\n{}", table(&rows, command));
    }
    text += "\n## Parts\n";
    let mut at = 0;
    while let Some(part) = references.get(at).copied() {
        let rows = rows(Source::Schema(part), &mut references);
        text += &format!("\n### {part}\n\n{}", table(&rows, part));
        at += 1;
    }
    text
}

#[test]
fn the_document_describes_every_field() {
    compare("docs/json.md", &document());
}

#[test]
fn every_command_that_prints_json_is_described() {
    let programs = built();
    let prints = programs.iter().flat_map(shown).filter(|command| {
        let formats = command.get_arguments().filter(|one| one.get_long() == Some("output"));
        // Some commands print something else, such as a picture.
        formats.flat_map(clap::Arg::get_possible_values).any(|format| format.get_name() == "json")
    });
    let prints: BTreeSet<&str> = prints.map(name).collect();
    let described = DOCUMENTS.iter().map(|document| document.command);
    let described = described.map(|command| command.split(" --").next().unwrap_or(command));
    let described: BTreeSet<&str> = described.chain(DIAGNOSES.iter().copied()).collect();
    assert_eq!(prints, described, "add the command to DOCUMENTS in this file");
}

/// What is printed has the described fields, and those that may be null are described as such.
#[test]
fn the_messages_are_printed_as_they_are_described() {
    fn printed(message: &impl serde::Serialize) -> Value {
        serde_json::to_value(message).expect("JSON")
    }
    for (message, value) in [
        ("StatusResponse", printed(&pb::StatusResponse::default())),
        ("PeerStatus", printed(&pb::PeerStatus::default())),
        ("PingResponse", printed(&pb::PingResponse::default())),
        ("PathStatus", printed(&pb::PathStatus::default())),
        ("PeerChange", printed(&pb::PeerChange::default())),
        ("Event", printed(&pb::Event::default())),
        ("ControllerStatus", printed(&pb::ControllerStatus::default())),
        ("KubernetesStatus", printed(&pb::KubernetesStatus::default())),
        ("ReflectorStatus", printed(&pb::ReflectorStatus::default())),
        ("RelayStatus", printed(&pb::RelayStatus::default())),
        ("ApiEndpointStatus", printed(&pb::ApiEndpointStatus::default())),
        ("ApiServerStatus", printed(&pb::ApiServerStatus::default())),
        ("Feature", printed(&pb::Feature::default())),
        ("Detail", printed(&pb::Detail::default())),
    ] {
        let rows = rows(Source::Schema(message), &mut References::new());
        let described: BTreeMap<&str, &Row> =
            rows.iter().map(|row| (row.name.as_str(), row)).collect();
        let printed = value.as_object().expect("an object");
        let keys: BTreeSet<&str> = printed.keys().map(String::as_str).collect();
        let documented: BTreeSet<&str> = described.keys().copied().collect();
        assert_eq!(keys, documented, "{message}");
        for (key, value) in printed {
            let kind = &described[key.as_str()].kind;
            assert_eq!(value.is_null(), kind.ends_with(" or null"), "{message}.{key}: {kind}");
        }
    }
}
