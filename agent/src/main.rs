//! The binary `towline`.

fn main() -> std::process::ExitCode {
    towline_agent::cli::run()
}
