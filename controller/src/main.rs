//! See the library: this only starts it.

fn main() -> std::process::ExitCode {
    towline_controller::cli::main()
}
