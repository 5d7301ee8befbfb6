//! Published vectors, with every backend of this CPU: RFC 8439 and Wycheproof. Each is tested in
//! batches of several sizes, so that it passes through every number of lanes per packet.

#![allow(clippy::unwrap_used)] // helpers of tests may panic too: the panic is the report

use data_encoding::HEXLOWER_PERMISSIVE;
use towline_aead::internals::{backends, open, seal};
use towline_aead::{Key, MAX_PACKET_BYTES, Packet, TAG_BYTES};
use wycheproof::TestResult;
use wycheproof::aead::{TestFlag, TestName, TestSet};

/// Sizes of the batches of one vector.
const COUNTS: [usize; 8] = [1, 2, 3, 5, 8, 9, 16, 17];

fn hex(text: &str) -> Vec<u8> {
    HEXLOWER_PERMISSIVE.decode(text.split_whitespace().collect::<String>().as_bytes()).unwrap()
}

/// Message of a vector, with its ciphertext and tag.
struct Vector<'a> {
    name: String,
    key: &'a [u8],
    nonce: &'a [u8],
    aad: &'a [u8],
    plain: &'a [u8],
    sealed: &'a [u8],
    tag: &'a [u8],
    valid: bool,
}

impl Vector<'_> {
    fn check(&self) {
        let key: &[u8; 32] = self.key.try_into().unwrap();
        let (prefix, counter) = self.nonce.split_first_chunk().unwrap();
        let counter = u64::from_le_bytes(counter.try_into().unwrap());
        let stride = self.plain.len() + TAG_BYTES;
        for backend in backends() {
            let key = Key::new(key, backend);
            for count in COUNTS {
                let name = format!("{}, {} x {count}", self.name, backend.name());
                let packets: Vec<Packet> = (0..count)
                    .map(|i| Packet { start: i * stride, len: self.plain.len(), counter })
                    .collect();
                let mut sealed = [self.sealed, self.tag].concat().repeat(count);
                if self.valid {
                    let mut arena = [self.plain, &[0; TAG_BYTES]].concat().repeat(count);
                    seal(&key, *prefix, self.aad, &mut arena, &packets).unwrap();
                    assert_eq!(arena, sealed, "{name}: sealed");
                }
                let mut authentic = Vec::new();
                open(&key, *prefix, self.aad, &mut sealed, &packets, &mut authentic).unwrap();
                assert_eq!(authentic, vec![self.valid; count], "{name}: authentic");
                for opened in sealed.chunks(stride).filter(|_| self.valid) {
                    assert_eq!(&opened[..self.plain.len()], self.plain, "{name}: opened");
                }
            }
        }
    }
}

/// Plaintext of RFC 8439 sections 2.4.2 and 2.8.2.
const SUNSCREEN: &[u8] = b"Ladies and Gentlemen of the class of '99: \
If I could offer you only one tip for the future, sunscreen would be it.";

#[test]
fn rfc_8439_section_2_8_2_seals_and_opens() {
    let sealed = "d31a8d34648e60db7b86afbc53ef7ec2 a4aded51296e08fea9e2b5a736ee62d6
        3dbea45e8ca9671282fafb69da92728b 1a71de0a9e060b2905d6a5b67ecd3b36
        92ddbd7f2d778b8c9803aee328091b58 fab324e4fad675945585808b4831d7bc
        3ff4def08e4b7a9de576d26586cec64b 6116";
    Vector {
        name: "section 2.8.2".into(),
        key: &std::array::from_fn::<u8, 32, _>(|i| 0x80 + i as u8),
        nonce: &hex("070000004041424344454647"),
        aad: &hex("50515253c0c1c2c3c4c5c6c7"),
        plain: SUNSCREEN,
        sealed: &hex(sealed),
        tag: &hex("1ae10b594f09e26a7e902ecbd0600691"),
        valid: true,
    }
    .check();
}

#[test]
fn rfc_8439_appendix_a_5_opens() {
    let sealed = "64a0861575861af460f062c79be643bd 5e805cfd345cf389f108670ac76c8cb2
        4c6cfc18755d43eea09ee94e382d26b0 bdb7b73c321b0100d4f03b7f355894cf
        332f830e710b97ce98c8a84abd0b9481 14ad176e008d33bd60f982b1ff37c855
        9797a06ef4f0ef61c186324e2b350638 3606907b6a7c02b0f9f6157b53c867e4
        b9166c767b804d46a59b5216cde7a4e9 9040c5a40433225ee282a1b0a06c523e
        af4534d7f83fa1155b0047718cbc546a 0d072b04b3564eea1b422273f548271a
        0bb2316053fa76991955ebd63159434e cebb4e466dae5a1073a6727627097a10
        49e617d91d361094fa68f0ff77987130 305beaba2eda04df997b714d6c6f2c29
        a6ad5cb4022b02709b";
    let plain = "Internet-Drafts are draft documents valid for a maximum of six months and may be \
        updated, replaced, or obsoleted by other documents at any time. It is inappropriate to use \
        Internet-Drafts as reference material or to cite them other than as /\u{201c}work in \
        progress./\u{201d}";
    Vector {
        name: "appendix A.5".into(),
        key: &hex("1c9240a5eb55d38af333888604f6b5f0 473917c1402b80099dca5cbc207075c0"),
        nonce: &hex("000000000102030405060708"),
        aad: &hex("f33388860000000000004e91"),
        plain: plain.as_bytes(),
        sealed: &hex(sealed),
        tag: &hex("eead9d67890cbb22392336fea1851f38"),
        valid: true,
    }
    .check();
}

/// The key stream of the cipher alone: what is sealed of zeros begins with block 1.
#[test]
fn rfc_8439_key_streams_are_as_published() {
    let last_is_1: [u8; 32] = std::array::from_fn(|i| u8::from(i == 31));
    let counting: [u8; 32] = std::array::from_fn(|i| i as u8);
    let sunscreen = "6e2e359a2568f98041ba0728dd0d6981 e97e7aec1d4360c20a27afccfd9fae0b
        f91b65c5524733ab8f593dabcd62b357 1639d624e65152ab8f530c359f0861d8
        07ca0dbf500d6a6156a38e088a22b65e 52bc514d16ccf806818ce91ab7793736
        5af90bbf74a35be6b40b8eedf2785e42 874d";
    let zeros: &[u8] = &[0; 16];
    for (section, key, counter, plain, begin) in [
        ("A.1 #2", [0; 32], 0, zeros, "9f07e7be5551387a98ba977c732d080d"),
        ("A.1 #3", last_is_1, 0, zeros, "3aeb5224ecf849929b9d828db1ced4dd"),
        ("2.4.2", counting, 0x4a00_0000, SUNSCREEN, sunscreen),
    ] {
        let begin = hex(begin);
        for backend in backends() {
            let mut arena = [plain, &[0; TAG_BYTES]].concat();
            let packet = Packet { start: 0, len: plain.len(), counter };
            Key::new(&key, backend).seal(&mut arena, &[packet]).unwrap();
            assert_eq!(arena[..begin.len()], begin, "{section}, {}", backend.name());
        }
    }
}

#[test]
fn wycheproof_vectors_are_judged_as_published() {
    let set = TestSet::load(TestName::ChaCha20Poly1305).unwrap();
    let (mut valid, mut invalid, mut other_sizes) = (0, 0, 0);
    for group in set.test_groups {
        for test in group.tests {
            if group.nonce_size != 96 {
                // The nonce's length is a type here.
                assert!(test.flags.contains(&TestFlag::InvalidNonceSize));
                other_sizes += 1;
                continue;
            }
            assert_eq!((group.key_size, group.tag_size), (256, 8 * TAG_BYTES));
            assert!(test.pt.len() <= MAX_PACKET_BYTES);
            let is_valid = match test.result {
                TestResult::Valid | TestResult::Acceptable => true,
                TestResult::Invalid => false,
            };
            *(if is_valid { &mut valid } else { &mut invalid }) += 1;
            Vector {
                name: format!("test {}", test.tc_id),
                key: &test.key,
                nonce: &test.nonce,
                aad: &test.aad,
                plain: &test.pt,
                sealed: &test.ct,
                tag: &test.tag,
                valid: is_valid,
            }
            .check();
        }
    }
    assert!(
        valid >= 200 && invalid >= 60,
        "{valid} valid, {invalid} invalid, {other_sizes} others"
    );
}
