//! Tests of what a configuration may be, and of what is said of one that is not.

use towline_service::log::LogFormat;

use super::*;

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("agent.toml")).map_err(|error| error.to_string())
}

#[test]
fn an_empty_file_is_the_default() {
    assert_eq!(parse("").unwrap(), Config::default());
}

#[test]
fn an_unknown_key_is_named_with_its_line() {
    let error = parse("[wireguard]\nport = 1\nprot = 2\n").unwrap_err();
    assert!(error.contains("line 3") && error.contains("prot"), "{error}");
    assert!(!error.contains('\n'), "{error}");
}

#[test]
fn values_out_of_bounds_say_what_would_be_right() {
    for (text, says) in [
        ("[link]\nmtu = 1000", "MTU 1000 is outside 1280"),
        ("[link]\nname = \"a-name-that-is-too-long\"", "15"),
        ("[wireguard]\nport = 0", "port"),
        ("[wireguard]\nspin_us = 1001", "0 to 1000"),
        ("[wireguard]\nseal_ahead = \"on\"", "\"off\" or a number of 1 to 8"),
        ("[wireguard]\nseal_ahead = 0", "1 to 8"),
        ("[wireguard]\nseal_ahead = 9", "1 to 8"),
        ("[wireguard]\nseal_ahead = -1", "1 to 8"),
        ("[wireguard]\nseal_ahead = 1\nworkers = 2", "needs `workers = 1`"),
        ("[routing]\ntable = 254", "kernel"),
        ("[routing]\nmark = 0x100", "mask"),
        ("[routing]\nmark = 0x30", "at least one bit"),
        ("[routing]\nplain_ports = [0]", "65535"),
        ("[node]\nprefixes = [\"10.0.0.1/8\"]", "10.0.0.0/8"),
        ("[node]\nforward_to = [\"10.0.0.1/8\"]", "10.0.0.0/8"),
        ("[node]\nforward_to = [\"169.254.169.254/32\"]", "never comes out of a tunnel"),
        ("[node]\nforward_to = [\"fe80::/64\"]", "never comes out of a tunnel"),
        ("[node]\nforward_to = [\"224.0.0.0/4\"]", "never comes out of a tunnel"),
        ("[node]\nexclude_prefixes = [\"10.0.0.1/8\"]", "10.0.0.0/8"),
        ("[node]\nnode_ips = [\"10.0.0.1\", \"10.0.0.2\"]", "one address"),
        ("[node]\naddressing = \"both\"", "node-ip"),
        ("[node]\nadvertise = [\"0.0.0.0:1\"]", "valid endpoint"),
        ("[offloads]\nudp_gso = false", "udp_segment"),
        ("[controller]\naddresses = [\"nope\"]", "host:port"),
        ("[metrics]\nlisten = \"9586\"", "overlay:9586"),
        ("[kubernetes]\napi_endpoint = \"0.0.0.0:7445\"", "127.0.0.1:7445"),
        ("[kubernetes]\napi_endpoint = \"127.0.0.1:0\"", "127.0.0.1:7445"),
        ("[kubernetes]\napi_port = 0", "nonzero"),
        ("[metrics]\nlisten = \"overlay:0\"", "127.0.0.1:9586"),
    ] {
        let error = parse(text).unwrap_err();
        assert!(error.contains(says), "{text}: {error}");
    }
}

#[test]
fn the_log_is_text_unless_json_is_asked_for() {
    assert_eq!(Config::default().log.format, LogFormat::Text);
    assert_eq!(parse("[log]\nformat = \"json\"").unwrap().log.format, LogFormat::Json);
    let error = parse("[log]\nformat = \"xml\"").unwrap_err();
    assert!(error.contains("line 2") && error.contains("json"), "{error}");
}

#[test]
fn one_offload_is_switched_off_without_the_others() {
    let offloads = parse("[offloads]\ntun_udp = false").unwrap().offloads;
    assert_eq!(offloads, Offloads { tun_udp: false, ..Offloads::default() });
}

#[test]
fn the_number_of_threads_that_seal_is_a_word_or_a_number() {
    let of = |text: &str| parse(&format!("[wireguard]\nseal_ahead = {text}")).unwrap();
    for text in ["\"auto\"", "\"off\"", "1", "8"] {
        let config = of(text);
        assert_eq!(parse(&toml::to_string(&config).unwrap()).unwrap(), config, "{text}");
    }
    assert_eq!(of("\"auto\""), Config::default());
    assert_eq!(of("8").wireguard.seal_ahead.helpers(1, 1), 8);
}

#[test]
fn the_address_of_the_metrics_reads_back() {
    assert_eq!(parse("[metrics]").unwrap().metrics.listen, None);
    assert_eq!(parse("[metrics]\nlisten = \"\"").unwrap().metrics.listen, None);
    for address in ["127.0.0.1:9586", "[::1]:9586", "overlay:9586"] {
        let config = parse(&format!("[metrics]\nlisten = \"{address}\"")).unwrap();
        let listen = config.metrics.listen.unwrap();
        assert_eq!(String::from(listen), address);
        assert_eq!(parse(&toml::to_string(&config).unwrap()).unwrap(), config);
    }
}

#[test]
fn an_agent_that_cannot_send_spans_refuses_a_collector() {
    let parsed = parse("[telemetry]\notlp_endpoint = \"http://127.0.0.1:4317\"");
    assert_eq!(parsed.is_ok(), telemetry::IS_BUILT);
    assert!(parsed.err().is_none_or(|error| error.contains("--features otel")));
}

#[test]
fn the_example_that_is_shipped_is_the_default() {
    assert_eq!(parse(include_str!("../../../deploy/agent.toml")).unwrap(), Config::default());
}

#[test]
fn the_default_configuration_reads_back() {
    let text = toml::to_string(&Config::default()).unwrap();
    assert_eq!(parse(&text).unwrap(), Config::default());
}
