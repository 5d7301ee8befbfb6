//! libFuzzer entry point of `towline_tests::fuzz::pipeline_batch`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| towline_tests::fuzz::pipeline_batch(bytes));
