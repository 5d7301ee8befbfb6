//! Checks that the modules of each package depend on each other in one direction.
//!
//! Modules are compared with their siblings: below one module, no two parts may need each other,
//! directly or over other parts. A path from a module to its own child or back is no dependency: the
//! parent is made of its children.

use std::collections::{BTreeMap, BTreeSet};

use super::source::{Module, paths, product_modules};

/// An arrow from one part to another, with an example of a module that names another.
type Arrows = BTreeMap<Module, BTreeMap<Module, String>>;

#[test]
fn no_modules_of_a_package_depend_on_each_other_in_a_circle() {
    let mut circles = Vec::new();
    for package in super::packages() {
        let directory = package.manifest_path.parent().expect("a directory");
        for circle in circles_of(&product_modules(&directory.join("src"))) {
            circles.push(format!("{}: {circle}", package.name));
        }
    }
    assert!(circles.is_empty(), "move what both need below both:\n{}", circles.join("\n"));
}

/// Returns a description of one circle below each module that has any.
fn circles_of(modules: &BTreeMap<Module, String>) -> Vec<String> {
    let mut below: BTreeMap<Module, Arrows> = BTreeMap::new();
    for (from, code) in modules {
        for path in paths(code) {
            let to = target(from, &path, modules);
            let common = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
            if common == from.len() || common == to.len() {
                continue;
            }
            let (parent, source) = (from[..common].to_vec(), from[..=common].to_vec());
            let example = format!("{} names {}", from.join("::"), path.join("::"));
            let arrows = below.entry(parent).or_default().entry(source).or_default();
            arrows.entry(to[..=common].to_vec()).or_insert(example);
        }
    }
    below.values().filter_map(circle).collect()
}

/// Returns the module that a path leads to: its longest prefix that is a module.
fn target(from: &Module, path: &[&str], modules: &BTreeMap<Module, String>) -> Module {
    let mut to = if path[0] == "crate" { Module::new() } else { from.clone() };
    for part in path {
        match *part {
            "crate" | "self" => {}
            "super" => {
                to.pop();
            }
            name => {
                to.push(name.to_owned());
                if !modules.contains_key(&to) {
                    to.pop();
                    break;
                }
            }
        }
    }
    to
}

/// Returns a description of a circle of arrows, if there is one.
fn circle(arrows: &Arrows) -> Option<String> {
    let mut finished = BTreeSet::new();
    arrows.keys().find_map(|start| visit(start, arrows, &mut Vec::new(), &mut finished))
}

fn visit<'a>(
    part: &'a Module,
    arrows: &'a Arrows,
    way: &mut Vec<&'a Module>,
    finished: &mut BTreeSet<&'a Module>,
) -> Option<String> {
    if let Some(at) = way.iter().position(|one| *one == part) {
        let circle = way[at..].iter().zip(way[at + 1..].iter().chain([&part]));
        let examples = circle.map(|(from, to)| arrows[*from][*to].as_str());
        return Some(examples.collect::<Vec<_>>().join(", "));
    }
    if finished.contains(part) {
        return None;
    }
    way.push(part);
    let next = arrows.get(part).into_iter().flat_map(BTreeMap::keys);
    let found = next.into_iter().find_map(|to| visit(to, arrows, way, finished));
    way.pop();
    finished.insert(part);
    found
}

#[test]
fn a_circle_is_found_and_described() {
    let modules = |list: &[(&str, &str)]| {
        let split = |path: &str| path.split("::").map(str::to_owned).collect::<Module>();
        list.iter().map(|(path, code)| (split(path), (*code).to_owned())).collect()
    };
    let straight = modules(&[("a", "use crate::b::T;"), ("b", "use super::c;"), ("c", "")]);
    assert_eq!(circles_of(&straight), [""; 0]);
    let with_its_child = modules(&[("a", "use self::b::T;"), ("a::b", "use super::U;")]);
    assert_eq!(circles_of(&with_its_child), [""; 0]);
    // Over a child of one of them, too.
    let round = modules(&[("a", "use crate::b::T;"), ("b", ""), ("b::c", "crate::a::f();")]);
    assert_eq!(circles_of(&round), ["a names crate::b::T, b::c names crate::a::f"]);
}
