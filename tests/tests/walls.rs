//! Checks the walls between the packages: which packages of the workspace each may depend on, and
//! that ARCHITECTURE.md shows the actual dependencies. The modules of each package depend on each
//! other in one direction ([`cycles`]), and no dependency is unused ([`unused`]).

#[path = "walls/cycles.rs"]
mod cycles;
#[path = "walls/source.rs"]
mod source;
#[path = "walls/unused.rs"]
mod unused;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use serde::Deserialize;
use towline_tests::checkout;

/// The allowed dependencies of a package. Build and test dependencies are not restricted.
struct Wall {
    package: &'static str,
    /// Allowed packages of this workspace.
    ours: &'static [&'static str],
    /// Allowed packages from outside the workspace; `None` allows all that the workspace uses.
    others: Option<&'static [&'static str]>,
}

const WALLS: &[Wall] = &[
    Wall {
        package: "towline-types",
        ours: &[],
        others: Some(&["crc32fast", "data-encoding", "ipnet", "serde", "thiserror", "zeroize"]),
    },
    Wall { package: "towline-proto", ours: &["towline-types"], others: None },
    Wall {
        package: "towline-core",
        ours: &["towline-types"],
        others: Some(&["ipnet", "rand", "tracing"]),
    },
    Wall { package: "towline-netlink", ours: &[], others: None },
    // The helper runs as root.
    Wall { package: "towline-helper", ours: &[], others: Some(&["libc", "nix"]) },
    Wall { package: "towline-nftables", ours: &["towline-netlink"], others: None },
    // The only package with vector instructions. Kept small, because it is audited as a whole.
    Wall { package: "towline-aead", ours: &[], others: Some(&["ring", "thiserror", "zeroize"]) },
    Wall {
        package: "towline-wireguard",
        ours: &["towline-aead", "towline-types"],
        others: Some(&[
            "blake2",
            "boringtun",
            "chacha20poly1305",
            "hmac",
            "ring",
            "x25519-dalek",
            "zeroize",
        ]),
    },
    Wall {
        package: "towline-dataplane",
        ours: &["towline-core", "towline-helper", "towline-types", "towline-wireguard"],
        others: None,
    },
    Wall {
        package: "towline-host",
        ours: &[
            "towline-core",
            "towline-helper",
            "towline-netlink",
            "towline-nftables",
            "towline-types",
        ],
        others: None,
    },
    Wall {
        package: "towline-agent",
        ours: &[
            "towline-core",
            "towline-dataplane",
            "towline-helper",
            "towline-host",
            "towline-netlink",
            "towline-proto",
            "towline-service",
        ],
        others: None,
    },
    Wall {
        package: "towline-registry",
        ours: &["towline-types"],
        others: Some(&["ipnet", "subtle", "thiserror"]),
    },
    Wall {
        package: "towline-controller",
        ours: &["towline-proto", "towline-registry", "towline-service"],
        others: None,
    },
    // It runs on operators' machines and reaches the mesh through `kubectl` alone.
    Wall { package: "kubectl-towline", ours: &["towline-service"], others: None },
    Wall { package: "towline-service", ours: &["towline-proto", "towline-types"], others: None },
    Wall {
        package: "towline-tests",
        ours: &[
            "towline-aead",
            "towline-agent",
            "towline-controller",
            "towline-core",
            "towline-dataplane",
            "towline-fixtures",
            "towline-helper",
            "towline-host",
            "towline-netlink",
            "towline-nftables",
            "towline-proto",
            "towline-service",
            "towline-wireguard",
        ],
        others: None,
    },
    Wall {
        package: "towline-fixtures",
        ours: &["towline-controller", "towline-core", "towline-proto", "towline-types"],
        others: None,
    },
    Wall { package: "towline-netns", ours: &["towline-netlink"], others: None },
];

/// Packages from outside the workspace that one package alone may depend on, each with that package.
const ONE_USER: &[(&str, &str)] = &[("boringtun", "towline-wireguard")];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    description: Option<String>,
    manifest_path: PathBuf,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// Kind of the dependency; `None` is a normal one, which the product is built from.
    kind: Option<String>,
}

impl Package {
    /// Returns the names of the normal dependencies, each once, in order.
    fn depends_on(&self) -> Vec<&str> {
        let normal = self.dependencies.iter().filter(|dependency| dependency.kind.is_none());
        let mut names: Vec<&str> = normal.map(|dependency| dependency.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}

fn root() -> PathBuf {
    // Cargo names the manifests by real paths.
    checkout::root().canonicalize().expect("the workspace")
}

fn packages() -> Vec<Package> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice::<Metadata>(&output.stdout).expect("metadata").packages
}

#[test]
fn no_package_depends_on_what_its_wall_does_not_allow() {
    let packages: BTreeMap<String, Package> =
        packages().into_iter().map(|package| (package.name.clone(), package)).collect();
    let walled: Vec<&str> = WALLS.iter().map(|wall| wall.package).collect();
    let without: Vec<_> = packages.keys().filter(|name| !walled.contains(&name.as_str())).collect();
    assert!(without.is_empty(), "packages without a row in WALLS: {without:?}");
    for wall in WALLS {
        for name in packages[wall.package].depends_on() {
            let owner = ONE_USER.iter().find(|(dependency, _)| *dependency == name);
            if let Some((_, owner)) = owner {
                assert_eq!(wall.package, *owner, "only {owner} may depend on {name}");
            }
            let allowed = if packages.contains_key(name) {
                wall.ours.contains(&name)
            } else {
                wall.others.is_none_or(|others| others.contains(&name))
            };
            assert!(allowed, "{} must not depend on {name}: see WALLS in this file", wall.package);
        }
    }
}

/// Returns the table of packages: path, name, description, and dependencies on packages of the
/// workspace.
fn crate_table(packages: &[Package]) -> String {
    let root = root();
    let ours: Vec<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    let mut rows: Vec<String> = packages
        .iter()
        .map(|package| {
            let directory = package.manifest_path.parent().expect("a directory");
            let path = directory.strip_prefix(&root).expect("inside the workspace").display();
            let depends_on = package.depends_on();
            let depends_on: Vec<&str> = depends_on
                .into_iter()
                .filter(|name| ours.contains(name))
                .map(|name| name.trim_start_matches("towline-"))
                .collect();
            let depends_on =
                if depends_on.is_empty() { "nothing".into() } else { depends_on.join(", ") };
            let owns = package.description.as_deref().expect("each package has a description");
            format!("| `{path}` | `{}` | {owns} | {depends_on} |\n", package.name)
        })
        .collect();
    rows.sort_unstable();
    format!("| path | package | owns | depends on (ours) |\n|---|---|---|---|\n{}", rows.concat())
}

#[test]
fn architecture_shows_the_packages_as_they_are() {
    const BEGIN: &str =
        "<!-- packages: written by UPDATE=1 cargo test -p towline-tests --test walls -->\n";
    const END: &str = "<!-- end of packages -->";
    let file = root().join("ARCHITECTURE.md");
    let text = std::fs::read_to_string(&file).unwrap();
    let (before, rest) = text.split_once(BEGIN).expect("the table's begin");
    let (table, after) = rest.split_once(END).expect("the table's end");
    let wanted = crate_table(&packages());
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&file, [before, BEGIN, &wanted, END, after].concat()).unwrap();
        return;
    }
    assert_eq!(table, wanted, "run UPDATE=1 cargo test -p towline-tests --test walls");
}
