//! Keeps a broken mesh running until Ctrl-C, for somebody who looks for the cause with the commands of an
//! operator.
//!
//! The fault is drawn at random, or is the one of a case. Nothing that is printed before the end names it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;

use super::ask::View;
use super::{Case, Options, Outcome, every_case};
use crate::lab::interrupt;
use crate::lab::keep_running::Kept;
use crate::lab::mesh::Controller;
use crate::lab::namespace::held;
use crate::lab::output::ProgressOutput;
use crate::lab::report::{Forbidden, WrongUsage};
use crate::lab::scenario::Setting;
use crate::lab::traffic::given_or_random;

/// What a case needs to keep its mesh running.
#[derive(Debug)]
pub(super) struct Exercise {
    /// Directory of the programs under test.
    binaries: PathBuf,
    output: Arc<ProgressOutput>,
}

/// Breaks one mesh and keeps it running until Ctrl-C. Returns which fault it was, as text for people.
///
/// # Errors
///
/// [`WrongUsage`] if the options select several cases, [`Forbidden`] if this machine cannot show the fault, and
/// what fails while the mesh is built.
pub fn keep(setting: &Setting, options: &Options) -> anyhow::Result<String> {
    let mut cases = options.kept_cases()?;
    cases.shuffle(&mut StdRng::seed_from_u64(given_or_random(None)?));
    let is_drawn = cases.len() > 1;
    let mut last = String::new();
    for mut case in cases {
        let step = if is_drawn { "building a mesh, and breaking it" } else { case.name };
        setting.output.step(step);
        case.exercise = Some(Exercise {
            binaries: setting.binaries.directory().to_owned(),
            output: Arc::clone(&setting.output),
        });
        let outcome = (case.check)(setting, &case);
        match outcome.with_context(|| format!("the mesh of {} does not run", case.name))? {
            Outcome::Asked(_) => return Ok(fault(&case)),
            Outcome::NotShown(why) => last = format!("{}: {why}", case.name),
        }
        interrupt::check()?;
    }
    let remedy = "choose another case: `--list` shows the names".to_owned();
    Err(Forbidden { what: format!("this machine cannot show {last}"), remedy }.into())
}

/// Returns the fault of a case, its name and its code.
fn fault(case: &Case) -> String {
    let Case { name, fault, cause, .. } = case;
    format!(
        "the fault was: {fault}\n  case: {name}\n  code: {cause}, see docs/troubleshooting.md\n"
    )
}

impl Options {
    /// Returns the case that the options select for `--keep`, or all faults if they select none. What needs no
    /// repair is returned only if it is selected.
    pub(super) fn kept_cases(&self) -> Result<Vec<Case>, WrongUsage> {
        let mut cases = every_case();
        if self.selection.cases.is_empty() {
            cases.retain(|case| !case.is_note);
            return Ok(cases);
        }
        cases.retain(|case| self.selection.has(case.name, true));
        // A whole name may be a part of another one.
        if let [whole] = self.selection.cases.as_slice()
            && let Some(index) = cases.iter().position(|case| case.name == whole.as_str())
        {
            return Ok(vec![cases.swap_remove(index)]);
        }
        match cases.len() {
            1 => Ok(cases),
            0 => Err(WrongUsage(
                "--keep needs a fault, and a healthy mesh has none: give --case the name of another case"
                    .to_owned(),
            )),
            several => Err(WrongUsage(format!(
                "--keep runs one case, and --case selects {several}: give it the whole name of one, or leave it out"
            ))),
        }
    }
}

impl Exercise {
    /// Says what is known about the fault, and keeps the lab running until Ctrl-C. `between` keeps up the fault.
    pub(super) fn stay(
        &self,
        views: &[View<'_>],
        between: &mut dyn FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let node = views.first().context("the case asks no node")?.node;
        let config = node.config();
        // The configuration is in the node's directory, which is in the lab's.
        let directory = config.ancestors().nth(2).context("the node has no directory")?;
        let mut kept = Kept::new(&self.binaries)?;
        let (mut nodes, mut others) = (Vec::new(), Vec::new());
        for (name, thread) in held()? {
            let mut environment = environment(directory, &name);
            let view = views.iter().find(|view| view.node.name() == name);
            for (variable, value) in
                view.into_iter().flat_map(|view| view.node.wrapped_environment())
            {
                environment.push((variable.to_owned(), value.to_owned()));
            }
            kept.add_held(&name, thread, environment.iter().map(|(n, v)| (n.as_str(), v.as_str())));
            let list = if environment.is_empty() { &mut others } else { &mut nodes };
            list.push(name);
        }
        self.output
            .step("the mesh is broken and keeps running: Ctrl-C ends it and shows the fault");
        for line in introduction(views, &nodes, &others, directory) {
            self.output.note(&line);
        }
        let mut failed = None;
        kept.stay_while(|| {
            // Ctrl-C ends what is being done, which is no failure.
            if let Err(error) = between()
                && !interrupt::raised()
            {
                failed.get_or_insert(error);
            }
        })?;
        if let Some(error) = failed {
            self.output.note(&format!("the fault could not be kept up all the time: {error:#}"));
        }
        Ok(())
    }
}

/// Returns the environment variables by which the commands find the node and the controller of a host. A host
/// without them has none.
fn environment(lab: &Path, host: &str) -> Vec<(String, String)> {
    let node = ("TOWLINE_CONFIG", lab.join(host).join("agent.toml"));
    let state = Controller::state_directory_in(lab, host);
    let controller = ("TOWLINE_CONTROLLER_STATE_DIR", state);
    let existing = [node, controller].into_iter().filter(|(_, path)| path.exists());
    existing.map(|(name, path)| (name.to_owned(), path.display().to_string())).collect()
}

/// Returns the lines that an operator reads first: the complaints, the hosts, and the commands to enter them.
fn introduction(
    views: &[View<'_>],
    nodes: &[String],
    others: &[String],
    directory: &Path,
) -> Vec<String> {
    let mut lines: Vec<String> =
        views.iter().map(|view| complaint(view.node.name(), view.peer)).collect();
    lines.push("some faults show only after two minutes".to_owned());
    lines.push(format!("nodes and controllers: {}", nodes.join(", ")));
    lines.push(format!("other hosts: {}", others.join(", ")));
    lines.push("commands for another terminal:".to_owned());
    for view in views {
        let name = view.node.name();
        lines.push(format!("  cargo lab shell {name}"));
        lines.push(format!("  cargo lab shell {name} towline doctor"));
        lines.push(format!("  cargo lab shell {name} towline explain {}", view.peer));
    }
    lines.push(format!("  logs and state: {}", directory.display()));
    lines
}

/// Returns the complaint of somebody who does not know the fault.
fn complaint(node: &str, peer: &str) -> String {
    format!("something is wrong on {node}, or between {node} and {peer}: find out what and why")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::scenario::selection::Selection;

    fn kept(cases: &[&str]) -> Result<Vec<&'static str>, String> {
        let cases = cases.iter().map(|&case| case.to_owned()).collect();
        let selection = Selection { cases, ..Selection::default() };
        let options = Options { selection, keep: true, ..Options::default() };
        let kept = options.kept_cases().map_err(|error| error.to_string())?;
        Ok(kept.iter().map(|case| case.name).collect())
    }

    #[test]
    fn one_case_is_kept_by_its_whole_name_or_by_a_part_of_it() {
        assert_eq!(kept(&["paths/udp-blocked"]), Ok(vec!["paths/udp-blocked"]));
        assert_eq!(kept(&["one-way"]), Ok(vec!["paths/udp-blocked-one-way"]));
        assert_eq!(kept(&["nodes/no-ipv6"]), Ok(vec!["nodes/no-ipv6"]));
    }

    #[test]
    fn several_cases_and_healthy_meshes_are_refused() {
        for wrong in [&["paths"][..], &["paths/loss", "paths/slow"]] {
            let message = kept(wrong).expect_err("several cases");
            assert!(message.contains("--case"), "{message}");
        }
        assert!(kept(&["healthy/"]).expect_err("no fault").contains("healthy"));
    }

    #[test]
    fn without_a_case_the_fault_is_drawn_among_those_that_need_repair() {
        let faults = kept(&[]).expect("faults");
        assert!(faults.len() >= 30 && !faults.contains(&"nodes/no-ipv6"), "{faults:?}");
    }

    #[test]
    fn nothing_is_wrong_with_keep_but_what_a_document_needs() {
        let options = Options { keep: true, ..Options::default() };
        assert!(options.check().is_ok());
        assert!(Options { update_docs: true, ..options }.check().is_err());
    }

    #[test]
    fn the_end_names_the_fault_and_its_code() {
        let case = Case::new("a/b", "A cable is cut", "no-answer", |_, _| unreachable!("not run"));
        let text = fault(&case);
        for part in ["a/b", "A cable is cut", "no-answer"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_host_gets_the_files_that_its_commands_need() {
        let lab = tempfile::tempdir().unwrap();
        let node = lab.path().join("cp");
        std::fs::create_dir(&node).unwrap();
        assert!(environment(lab.path(), "cp").is_empty());
        std::fs::write(node.join("agent.toml"), "").unwrap();
        std::fs::create_dir(lab.path().join("controller-cp")).unwrap();
        let names: Vec<String> =
            environment(lab.path(), "cp").into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["TOWLINE_CONFIG", "TOWLINE_CONTROLLER_STATE_DIR"]);
    }
}
