//! Entry point of the binary `towline-controller`. The library has everything else.

fn main() -> std::process::ExitCode {
    towline_controller::cli::main()
}
