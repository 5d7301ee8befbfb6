//! Certificates and keys as PEM text (RFC 7468).
//!
//! `rustls_pki_types::pem` reads certificates. The `pem` crate would leave copies of a private key in
//! memory.

use data_encoding::BASE64;
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject as _;
use zeroize::{Zeroize as _, Zeroizing};

/// Characters of base64 in a line (RFC 7468 section 2).
const LINE: usize = 64;

/// Returns a certificate as PEM text, from its DER.
pub fn certificate(der: &[u8]) -> String {
    let mut text = String::new();
    encode(&mut text, "CERTIFICATE", der);
    text
}

/// Returns a private key as PEM text, from its PKCS#8 DER.
pub fn private_key(pkcs8: &[u8]) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::new());
    encode(&mut text, "PRIVATE KEY", pkcs8);
    text
}

/// Returns the PKCS#8 DER of the first private key in PEM text, or `None` if there is none.
pub fn read_private_key(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    let mut read = PrivatePkcs8KeyDer::from_pem_slice(text.as_bytes()).ok()?;
    let der = Zeroizing::new(read.secret_pkcs8_der().to_vec());
    read.zeroize();
    Some(der)
}

fn encode(text: &mut String, label: &str, der: &[u8]) {
    let body = Zeroizing::new(BASE64.encode(der));
    // Reserve the whole length: a buffer that grows leaves copies of the key in memory.
    text.reserve(body.len() + body.len() / LINE + 2 * label.len() + 64);
    text.extend(["-----BEGIN ", label, "-----\n"]);
    for line in body.as_bytes().chunks(LINE) {
        text.extend(line.iter().copied().map(char::from));
        text.push('\n');
    }
    text.extend(["-----END ", label, "-----\n"]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls_pki_types::CertificateDer;

    #[test]
    fn what_is_written_reads_back_whatever_its_length() {
        for length in [0, 1, 47, 48, 49, 96, 1000] {
            let der: Vec<u8> = (0..length).map(|byte| byte as u8).collect();
            let certificates = [certificate(&der), certificate(&der)].concat();
            let read: Vec<_> = CertificateDer::pem_slice_iter(certificates.as_bytes())
                .map(Result::unwrap)
                .collect();
            assert_eq!(read, [der.as_slice(), &der].map(CertificateDer::from));
            assert!(certificates.lines().all(|line| line.len() <= LINE));
            let key = private_key(&der);
            assert_eq!(read_private_key(&key).unwrap().as_slice(), der);
        }
    }

    #[test]
    fn the_text_does_not_grow_while_it_is_written() {
        for length in 0..500 {
            let mut text = String::new();
            encode(&mut text, "PRIVATE KEY", &vec![7; length]);
            let mut reserved = String::new();
            let body = length.div_ceil(3) * 4;
            reserved.reserve(body + body / LINE + 2 * "PRIVATE KEY".len() + 64);
            assert_eq!(text.capacity(), reserved.capacity());
        }
    }
}
