//! Runs the flood scenario as a test: real binaries, rootless, with two quick cases.

use towline_tests::lab::scenario_test::figures;

#[test]
fn a_node_joins_beside_a_machine_that_guesses_tokens() {
    let lab = env!("CARGO_BIN_EXE_lab");
    let cases = "control/nobody,joins/same-source";
    let arguments = ["flood", "--case", cases, "--dev", "--mbit", "20"];
    let Some(flood) = figures(lab, &arguments).unwrap() else { return };
    let cases = flood["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 2, "{flood:#}");
    for case in cases {
        assert!(case["acts"].as_u64() > Some(0), "{case}");
        assert!(case["join_s"].is_f64(), "{case}");
        assert!(case["controller_mb"].as_f64() < Some(256.0), "{case}");
    }
}
