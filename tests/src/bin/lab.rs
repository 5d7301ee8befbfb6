//! Entry point of `cargo lab`: see [`towline_tests::lab`].

use std::process::ExitCode;

fn main() -> ExitCode {
    towline_tests::lab::cli::main()
}
