//! What makes builds of the same sources the same on each machine: programs name no directory of the machine.

use std::path::{Path, PathBuf};

use memchr::memmem;

/// A directory of this machine, and the name that programs have for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Directory {
    path: PathBuf,
    name: &'static str,
}

/// Returns the directories of the sources, of cargo's dependencies and of the build, which the compiler would name
/// in programs. If several contain a file, the last one counts.
pub(super) fn directories(
    checkout: &Path,
    cargo_home: Option<&Path>,
    build: &Path,
) -> Vec<Directory> {
    let sources = [(Some(checkout), "/towline"), (cargo_home, "/cargo"), (Some(build), "/build")];
    let named = |(path, name): (Option<&Path>, &'static str)| {
        Some(Directory { path: path?.to_owned(), name })
    };
    sources.into_iter().filter_map(named).collect()
}

/// Returns the compiler's flags for static programs without symbols, as cargo reads them from
/// `CARGO_ENCODED_RUSTFLAGS`.
pub(super) fn rustflags(directories: &[Directory]) -> String {
    let fixed = ["-C", "target-feature=+crt-static", "-C", "strip=symbols"];
    let mut flags: Vec<String> = fixed.map(ToOwned::to_owned).into();
    for Directory { path, name } in directories {
        flags.push(format!("--remap-path-prefix={}={name}", path.display()));
    }
    flags.join("\x1f")
}

/// Returns a directory of this machine that a program names.
pub(super) fn named_directory(program: &[u8], directories: &[Directory]) -> Option<String> {
    let is_named = |directory: &&Directory| {
        let text = format!("{}/", directory.path.display());
        // Not as the end of a longer path, such as `agent/src/` for `/src/`.
        memmem::find_iter(program, &text).any(|at| {
            let before = at.checked_sub(1).and_then(|at| program.get(at)).copied();
            !before.is_some_and(|byte| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte))
        })
    };
    directories.iter().find(is_named).map(|directory| directory.path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_directory_of_this_machine_is_found_in_a_program() {
        let home = Path::new("/root/.cargo");
        let all = directories(Path::new("/src"), Some(home), Path::new("/src/target/package"));
        let named = |program: &[u8]| named_directory(program, &all);
        assert_eq!(named(b"\0/src/agent/src/main.rs"), Some("/src".to_owned()));
        assert_eq!(named(b"(/root/.cargo/registry/src/a.rs"), Some("/root/.cargo".to_owned()));
        assert_eq!(named(b"/towline/agent/src/main.rs\0/cargo/registry/src/a.rs"), None);
    }

    #[test]
    fn two_builds_in_different_directories_are_the_same() {
        let root = tempfile::tempdir().unwrap();
        let build = |name: &str| {
            let checkout = root.path().join(name);
            std::fs::create_dir(&checkout).unwrap();
            let source = checkout.join("program.rs");
            std::fs::write(&source, "fn main() { panic!(\"{}\", file!()) }").unwrap();
            let all = directories(&checkout, None, &checkout.join("target"));
            let program = checkout.join("program");
            let flags = rustflags(&all);
            let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
            let output = Command::new(rustc)
                .args(flags.split('\x1f'))
                .args(["--edition", "2021", "-o"])
                .args([&program, &source])
                .current_dir(&checkout)
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let bytes = std::fs::read(&program).unwrap();
            assert_eq!(named_directory(&bytes, &all), None);
            assert!(memmem::find(&bytes, b"/towline/program.rs").is_some());
            bytes
        };
        assert!(build("first") == build("second"), "the bytes differ");
    }
}
