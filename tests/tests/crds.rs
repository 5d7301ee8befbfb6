//! Checks that the kinds in `deploy/kubernetes/crds.yaml` have the fields that the publisher writes: the API server
//! drops fields that a kind does not have.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::Value;
use towline_controller::publish::resources::{GROUP, Kind, Status, VERSION, wanted};
use towline_proto::pb;
use towline_tests::checkout;

/// Returns the paths of all fields of a value; those of the elements of an array too.
fn written(value: &Value, at: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let at = format!("{at}.{name}");
                written(value, &at, found);
                found.insert(at);
            }
        }
        Value::Array(elements) => elements.iter().for_each(|one| written(one, at, found)),
        _ => {}
    }
}

/// Returns the paths of all fields of a schema.
fn described(schema: &Value, at: &str, found: &mut BTreeSet<String>) {
    if schema["items"].is_object() {
        described(&schema["items"], at, found);
    }
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        let at = format!("{at}.{name}");
        described(schema, &at, found);
        found.insert(at);
    }
}

/// Returns the definition of a kind.
fn definition(kind: Kind) -> Value {
    let file = checkout::root().join("deploy/kubernetes/crds.yaml");
    let text = std::fs::read_to_string(file).expect("the definitions");
    let documents = text.split("\n---\n");
    let parsed = documents.map(|text| serde_saphyr::from_str::<Value>(text).expect("YAML"));
    let mut found = parsed.filter(|one| one["spec"]["names"]["kind"] == kind.name());
    found.next().expect("a definition of the kind")
}

#[test]
fn the_kinds_have_the_fields_that_are_written() {
    let node = pb::NodeTunnels {
        name: "a".to_owned(),
        peers: vec![pb::PeerTunnel {
            name: "b".to_owned(),
            state: pb::TunnelState::Down.into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let objects = wanted(&[node], Timestamp::UNIX_EPOCH);
    for kind in Kind::ALL {
        let definition = definition(kind);
        let spec = &definition["spec"];
        assert_eq!(definition["metadata"]["name"], format!("{}.{GROUP}", kind.plural()));
        assert_eq!(spec["names"]["plural"], kind.plural());
        let version = &spec["versions"][0];
        assert_eq!(version["name"], VERSION);
        let mut fields = (BTreeSet::new(), BTreeSet::new());
        let schema = &version["schema"]["openAPIV3Schema"]["properties"]["status"];
        described(schema, "", &mut fields.0);
        let (_, status) = objects.iter().find(|((of, _), _)| *of == kind).expect("an object");
        let status = match status {
            Status::Node(node) => serde_json::to_value(node),
            Status::Path(path) => serde_json::to_value(path),
        };
        written(&status.expect("JSON"), "", &mut fields.1);
        assert_eq!(fields.0, fields.1, "{}", kind.name());
        // A column whose field is missing would be empty.
        for column in version["additionalPrinterColumns"].as_array().expect("columns") {
            let path = column["jsonPath"].as_str().expect("a path");
            let field = path.trim_start_matches(".status").split('[').next().unwrap_or_default();
            assert!(fields.0.contains(field), "{path}");
        }
    }
}
