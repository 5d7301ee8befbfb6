//! Compiles the schema with protox, so that no protoc is needed.

/// Messages of status output, which are printed as JSON.
const STATUS: &[&str] = &[
    "ApiEndpointStatus",
    "ApiServerStatus",
    "ControllerStatus",
    "Detail",
    "Event",
    "Feature",
    "GuardedNetwork",
    "KubernetesStatus",
    "PathStatus",
    "PeerChange",
    "PeerResponse",
    "PeerStatus",
    "PingResponse",
    "ReflectorStatus",
    "RelayStatus",
    "StatusResponse",
];
/// Fields of them that have another form in JSON, each with the function of `status.rs` that writes it.
const FORMS: &[(&str, &str)] = &[
    ("Event.at", "millis"),
    ("Event.peer", "text"),
    ("Event.reason_code", "text"),
    ("GuardedNetwork.node", "text"),
    ("PathStatus.local_address", "text"),
    ("PathStatus.relay", "text"),
    ("PeerChange.at", "millis"),
    ("PeerChange.from_path", "text"),
    ("PeerChange.from_state", "text"),
    ("PeerChange.reason", "text"),
    ("PeerChange.reason_code", "text"),
    ("PeerChange.to_path", "text"),
    ("PeerChange.to_state", "text"),
    ("PeerStatus.candidates", "candidates"),
    ("PeerStatus.path", "text"),
    ("PeerStatus.path_kind", "text"),
    ("PeerStatus.reason", "text"),
    ("PeerStatus.reason_code", "text"),
    ("PeerStatus.relay", "text"),
    ("PeerStatus.site", "text"),
    ("ReflectorStatus.mapped_address", "text"),
    ("StatusResponse.candidates", "candidates"),
    ("StatusResponse.certificate_expires_at", "time"),
    ("StatusResponse.down_since", "optional_time"),
    ("StatusResponse.drops", "counters"),
    ("StatusResponse.mesh_id", "text"),
    ("StatusResponse.name", "text"),
    ("StatusResponse.nat_mapping", "text"),
    ("StatusResponse.node_id", "text"),
    ("StatusResponse.site", "text"),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(
        [
            "towline/v1/signed.proto",
            "towline/v1/discovery.proto",
            "towline/v1/admin.proto",
            "towline/v1/local.proto",
            "grpc/health/v1/health.proto",
            "grpc/reflection/v1/reflection.proto",
        ],
        ["proto"],
    )?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    // A test enumerates the RPCs from the descriptors, so that none can be added without a role.
    std::fs::write(out.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    let mut config = tonic_prost_build::configure();
    for message in STATUS {
        config =
            config.type_attribute(format!(".towline.v1.{message}"), "#[derive(serde::Serialize)]");
    }
    for (field, form) in FORMS {
        let form = format!("#[serde(serialize_with = \"crate::status::{form}\")]");
        config = config.field_attribute(format!(".towline.v1.{field}"), form);
    }
    config
        .build_transport(false)
        .bytes(".towline.v1.Signed")
        .bytes(".towline.v1.Changes.changes")
        .compile_fds(descriptors)?;
    Ok(())
}
