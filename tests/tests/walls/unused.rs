//! Checks that each package names what its manifest depends on, in the code that the kind of
//! dependency is for. No build is needed.

use super::source::{all_code, product_modules};

/// Dependencies that no code names, each with the reason.
const UNNAMED: &[(&str, &str, &str)] = &[
    ("towline-proto", "tonic-prost", "named by the code that the build script generates"),
    ("towline-tests", "netlink-packet-core", SAME_FEATURES),
    ("towline-tests", "netlink-packet-route", SAME_FEATURES),
];
/// Reason of a dependency that only tests name, in a package that is only built for tests.
const SAME_FEATURES: &str = "as a dev-dependency it would give `cargo test` other features of common \
                             dependencies than `cargo lab` has";

#[test]
fn every_dependency_is_named_in_the_code_that_it_is_for() {
    let mut unused = Vec::new();
    for package in super::packages() {
        let directory = package.manifest_path.parent().expect("a directory");
        let code = |places: &[&str]| {
            let texts = places.iter().map(|place| all_code(&directory.join(place)));
            texts.collect::<Vec<_>>().join("\n")
        };
        let product = product_modules(&directory.join("src"));
        let product = product.into_values().collect::<Vec<_>>().join("\n");
        let (all, build) = (code(&["src", "tests", "benches"]), code(&["build.rs"]));
        for dependency in &package.dependencies {
            let code = match dependency.kind.as_deref() {
                None => &product,
                Some("dev") => &all,
                _ => &build,
            };
            let has_reason = UNNAMED
                .iter()
                .any(|(owner, name, _)| *owner == package.name && *name == dependency.name);
            match (names(code, &dependency.name), has_reason) {
                (true, false) | (false, true) => {}
                (true, true) => unused.push(format!(
                    "{} names {}: remove it from UNNAMED",
                    package.name, dependency.name
                )),
                (false, false) if dependency.kind.is_none() && names(&all, &dependency.name) => {
                    unused.push(format!(
                        "{} names {} only in tests: make it a dev-dependency",
                        package.name, dependency.name
                    ));
                }
                (false, false) => unused.push(format!(
                    "{} does not name {}: remove the dependency, or list it in UNNAMED",
                    package.name, dependency.name
                )),
            }
        }
    }
    assert!(unused.is_empty(), "{}", unused.join("\n"));
}

/// Returns whether the code contains the name of a package, as code writes it.
fn names(code: &str, package: &str) -> bool {
    let name = package.replace('-', "_");
    code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == name)
}

#[test]
fn names_are_whole_words() {
    assert!(names("use towline_proto::pb;", "towline-proto"));
    assert!(!names("use towline_proto_extra::pb;", "towline-proto"));
}
