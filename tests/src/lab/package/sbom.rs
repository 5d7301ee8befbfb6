//! Software bill of materials of the programs: CycloneDX 1.6 in JSON, from `cargo metadata` and `Cargo.lock`. It
//! has neither a time nor a random number, so that the same sources give the same bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::checkout;

/// Packages whose programs are shipped.
const SHIPPED: [&str; 3] = ["towline-agent", "towline-controller", "towline-helper"];

/// Output of `cargo metadata`, reduced to what the document needs.
#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Debug, Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    license_file: Option<String>,
    /// Registry or repository; `None` for a package of this checkout.
    source: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Debug, Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<Kind>,
}

#[derive(Debug, Deserialize)]
struct Kind {
    /// `None` for an ordinary dependency.
    kind: Option<String>,
}

/// Returns the document for programs of this target.
pub(super) fn document(target: &str) -> anyhow::Result<Vec<u8>> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--format-version", "1", "--locked", "--filter-platform", target])
        .current_dir(checkout::root())
        .stdin(Stdio::null())
        .output()
        .context("cannot run cargo metadata")?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "cargo metadata failed: {}", words.trim());
    let metadata = serde_json::from_slice(&output.stdout).context("cargo metadata: no JSON")?;
    let lock = std::fs::read_to_string(checkout::root().join("Cargo.lock"))
        .context("cannot read Cargo.lock")?;
    let document = describe(&metadata, &checksums(&lock), target)?;
    let mut bytes = serde_json::to_vec_pretty(&document)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Returns the SHA-256 checksums of a lock file, by name and version.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let value = |block: &str, key: &str| {
        let lines = block.lines();
        let found = lines.filter_map(|line| line.strip_prefix(key)?.strip_prefix(" = \""));
        found.filter_map(|rest| rest.strip_suffix('"')).next().map(ToOwned::to_owned)
    };
    let blocks = lock.split("[[package]]").skip(1);
    let packages = blocks.filter_map(|block| {
        Some(((value(block, "name")?, value(block, "version")?), value(block, "checksum")?))
    });
    packages.collect()
}

fn describe(
    metadata: &Metadata,
    checksums: &BTreeMap<(String, String), String>,
    target: &str,
) -> anyhow::Result<Value> {
    let packages: BTreeMap<&str, &Package> =
        metadata.packages.iter().map(|package| (package.id.as_str(), package)).collect();
    let nodes: BTreeMap<&str, &Node> =
        metadata.resolve.nodes.iter().map(|node| (node.id.as_str(), node)).collect();
    let roots: Vec<&Package> = SHIPPED
        .iter()
        .map(|name| {
            let mut ours = metadata.packages.iter().filter(|package| package.source.is_none());
            ours.find(|package| package.name == *name).with_context(|| format!("no {name}"))
        })
        .collect::<anyhow::Result<_>>()?;

    // What the programs are built of: no tests, no benchmarks.
    let mut waiting: Vec<&str> = roots.iter().map(|package| package.id.as_str()).collect();
    let mut needed: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    while let Some(id) = waiting.pop() {
        if needed.contains_key(id) {
            continue;
        }
        let node = nodes.get(id).with_context(|| format!("{id} is not resolved"))?;
        let is_built = |dependency: &&Dependency| {
            dependency.dep_kinds.iter().any(|kind| kind.kind.as_deref() != Some("dev"))
        };
        let all: BTreeSet<&str> =
            node.deps.iter().filter(is_built).map(|dependency| dependency.pkg.as_str()).collect();
        waiting.extend(&all);
        needed.insert(id, all);
    }

    let package = |id: &str| packages.get(id).copied().with_context(|| format!("no package {id}"));
    let mut components = BTreeMap::new();
    let mut dependencies = BTreeMap::new();
    for (id, all) in &needed {
        let needing = package(id)?;
        let mut names =
            all.iter().map(|id| Ok(reference(package(id)?))).collect::<anyhow::Result<Vec<_>>>()?;
        names.sort();
        let name = reference(needing);
        dependencies.insert(name.clone(), json!({"ref": name, "dependsOn": names}));
        components.insert(name, component(needing, checksums)?);
    }
    let version = env!("CARGO_PKG_VERSION");
    let whole = format!("towline@{version}");
    let roots: BTreeSet<String> = roots.into_iter().map(reference).collect();
    dependencies.insert(whole.clone(), json!({"ref": whole, "dependsOn": roots}));
    Ok(json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": whole,
                "name": "towline",
                "version": version,
            },
            "properties": [{"name": "towline:target", "value": target}],
        },
        "components": components.into_values().collect::<Vec<_>>(),
        "dependencies": dependencies.into_values().collect::<Vec<_>>(),
    }))
}

/// Returns the name of a package in the document: its package URL if it comes from crates.io.
fn reference(package: &Package) -> String {
    let Package { name, version, source, .. } = package;
    match source {
        Some(_) => format!("pkg:cargo/{name}@{version}"),
        None => format!("{name}@{version}"),
    }
}

fn component(
    package: &Package,
    checksums: &BTreeMap<(String, String), String>,
) -> anyhow::Result<Value> {
    let name = reference(package);
    let mut component = json!({
        "type": "library",
        "bom-ref": name,
        "name": package.name,
        "version": package.version,
    });
    // Earlier manifests separate alternatives by a slash.
    let expression = package.license.as_ref().map(|license| license.replace('/', " OR "));
    component["licenses"] = match (expression, &package.license_file) {
        (Some(expression), _) => json!([{"expression": expression}]),
        (None, Some(file)) => json!([{"license": {"name": file}}]),
        (None, None) => json!([]),
    };
    if package.source.is_some() {
        let checksum = checksums.get(&(package.name.clone(), package.version.clone()));
        let checksum = checksum.with_context(|| format!("no checksum of {name} in Cargo.lock"))?;
        component["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
        component["purl"] = json!(name);
    }
    Ok(component)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made() -> Value {
        let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        let bytes = document(&target).unwrap();
        assert_eq!(bytes, document(&target).unwrap(), "the same sources give the same bytes");
        serde_json::from_slice(&bytes).unwrap()
    }

    fn text<'a>(value: &'a Value, key: &str) -> &'a str {
        value[key].as_str().unwrap_or_else(|| panic!("no {key} in {value}"))
    }

    #[test]
    fn the_bill_of_materials_has_what_the_programs_are_built_of_and_nothing_else() {
        let made = made();
        assert_eq!((text(&made, "bomFormat"), text(&made, "specVersion")), ("CycloneDX", "1.6"));
        let components = made["components"].as_array().unwrap();
        let names: Vec<&str> = components.iter().map(|part| text(part, "name")).collect();
        for name in SHIPPED.into_iter().chain(["boringtun", "ring", "rustls", "towline-core"]) {
            assert!(names.contains(&name), "{name}");
        }
        // Tests alone use these.
        for name in ["criterion", "proptest", "hcl-edit", "towline-tests", "towline-fixtures"] {
            assert!(!names.contains(&name), "{name}");
        }
        for part in components {
            assert!(!part["licenses"].as_array().unwrap().is_empty(), "{part}");
            if !text(part, "name").starts_with("towline-") {
                assert_eq!(text(&part["hashes"][0], "content").len(), 64, "{part}");
                assert_eq!(text(part, "purl"), text(part, "bom-ref"));
            }
        }
    }

    #[test]
    fn each_dependency_of_the_bill_is_a_component_of_it() {
        let made = made();
        let components = made["components"].as_array().unwrap();
        let parts: BTreeSet<&str> = components.iter().map(|part| text(part, "bom-ref")).collect();
        assert_eq!(parts.len(), components.len(), "each has a name of its own");
        let dependencies = made["dependencies"].as_array().unwrap();
        assert_eq!(dependencies.len(), parts.len() + 1, "those of the whole are there too");
        for needed in dependencies.iter().flat_map(|entry| entry["dependsOn"].as_array().unwrap()) {
            assert!(parts.contains(needed.as_str().unwrap()), "{needed}");
        }
    }

    #[test]
    fn checksums_are_read_from_the_lock_file() {
        let lock = "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.2.3\"\nsource = \
                    \"registry\"\nchecksum = \"abc\"\n\n[[package]]\nname = \"ours\"\nversion = \
                    \"0.1.0\"\ndependencies = [\n \"a\",\n]\n";
        let known = checksums(lock);
        assert_eq!(known.len(), 1);
        assert_eq!(known[&("a".to_owned(), "1.2.3".to_owned())], "abc");
    }
}
