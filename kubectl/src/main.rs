//! The binary `kubectl-towline`, which kubectl runs for `kubectl towline`.

fn main() -> std::process::ExitCode {
    kubectl_towline::main()
}
