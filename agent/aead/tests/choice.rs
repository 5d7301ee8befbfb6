//! Which backend this CPU gets. `.ci/run` runs this also on emulated CPUs.

use towline_aead::internals::backends;
use towline_aead::{Aead, Backend};

#[test]
fn auto_is_the_fastest_backend_that_the_cpu_has() {
    let names: Vec<&str> = backends().iter().map(|backend| backend.name()).collect();
    println!("backends: {}", names.join(", "));
    assert_eq!(Backend::select(Aead::Auto), backends()[0]);
    assert_eq!(names.last(), Some(&"ring"));
    #[cfg(target_arch = "x86_64")]
    {
        let expected = [
            ("avx512-ifma", is_x86_feature_detected!("avx512ifma")),
            ("avx512vl", is_x86_feature_detected!("avx512vl")),
            ("avx2", is_x86_feature_detected!("avx2")),
            ("ring", true),
        ];
        let expected: Vec<&str> =
            expected.into_iter().filter_map(|(name, has)| has.then_some(name)).collect();
        assert_eq!(names, expected);
    }
}

#[test]
fn ring_can_be_chosen() {
    let backend = Backend::select(Aead::Ring);
    assert_eq!((backend.name(), backend.is_batched()), ("ring", false));
}
