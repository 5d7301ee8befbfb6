//! libFuzzer entry point of `towline_tests::fuzz::wireguard`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| towline_tests::fuzz::wireguard(bytes));
