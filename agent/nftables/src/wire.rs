//! Numbers of the nftables netlink interface (`linux/netfilter/nf_tables.h`).

/// Returns the netlink message type, which has the subsystem in the upper byte.
pub(super) const fn message_kind(message: u16) -> u16 {
    ((libc::NFNL_SUBSYS_NFTABLES as u16) << 8) | message
}

/// Length in bytes of `struct nfgenmsg`.
pub(super) const HEADER: usize = 4;

/// Encodes `struct nfgenmsg`: family, version, and the resource in network byte order.
pub(super) const fn header(family: u8, resource: u16) -> [u8; HEADER] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

pub(super) const BATCH_BEGIN: u16 = 0x10;
pub(super) const BATCH_END: u16 = 0x11;

pub(super) const NEW_TABLE: u16 = 0;
pub(super) const GET_TABLE: u16 = 1;
pub(super) const DELETE_TABLE: u16 = 2;
pub(super) const NEW_CHAIN: u16 = 3;
pub(super) const GET_CHAIN: u16 = 4;
pub(super) const DELETE_CHAIN: u16 = 5;
pub(super) const NEW_RULE: u16 = 6;
pub(super) const GET_RULE: u16 = 7;
pub(super) const DELETE_RULE: u16 = 8;
pub(super) const NEW_SET: u16 = 9;
pub(super) const GET_SET: u16 = 10;
pub(super) const DELETE_SET: u16 = 11;
pub(super) const NEW_ELEMENT: u16 = 12;
pub(super) const GET_ELEMENT: u16 = 13;
pub(super) const DELETE_ELEMENT: u16 = 14;

pub(super) mod table {
    pub(crate) const NAME: u16 = 1;
    pub(crate) const FLAGS: u16 = 2;
    pub(crate) const USERDATA: u16 = 6;
    pub(crate) const FLAG_OWNER: u32 = 2;
    pub(crate) const FLAG_PERSIST: u32 = 4;
}

pub(super) mod chain {
    pub(crate) const TABLE: u16 = 1;
    pub(crate) const NAME: u16 = 3;
    pub(crate) const HOOK: u16 = 4;
    pub(crate) const POLICY: u16 = 5;
    pub(crate) const TYPE: u16 = 7;
    pub(crate) const HOOK_NUMBER: u16 = 1;
    pub(crate) const HOOK_PRIORITY: u16 = 2;
}

pub(super) mod rule {
    pub(crate) const TABLE: u16 = 1;
    pub(crate) const CHAIN: u16 = 2;
    pub(crate) const HANDLE: u16 = 3;
    pub(crate) const EXPRESSIONS: u16 = 4;
    pub(crate) const USERDATA: u16 = 7;
}

pub(super) mod set {
    pub(crate) const TABLE: u16 = 1;
    pub(crate) const NAME: u16 = 2;
    pub(crate) const FLAGS: u16 = 3;
    pub(crate) const KEY_TYPE: u16 = 4;
    pub(crate) const KEY_LENGTH: u16 = 5;
    pub(crate) const DESCRIPTION: u16 = 9;
    pub(crate) const ID: u16 = 10;
    pub(crate) const DESCRIPTION_SIZE: u16 = 1;
    pub(crate) const FLAG_ANONYMOUS: u32 = 1;
    pub(crate) const FLAG_INTERVAL: u32 = 4;
    pub(crate) const FLAG_TIMEOUT: u32 = 0x10;
    pub(crate) const FLAG_EVALUATE: u32 = 0x20;
}

pub(super) mod element {
    pub(crate) const LIST_TABLE: u16 = 1;
    pub(crate) const LIST_SET: u16 = 2;
    pub(crate) const LIST_ELEMENTS: u16 = 3;
    pub(crate) const KEY: u16 = 1;
    pub(crate) const DATA: u16 = 2;
    pub(crate) const FLAGS: u16 = 3;
    pub(crate) const KEY_END: u16 = 10;
    pub(crate) const FLAG_INTERVAL_END: u32 = 1;
}

/// Attribute with an item of a list.
pub(super) const LIST_ITEM: u16 = 1;
/// Attribute with a value, inside a data attribute.
pub(super) const DATA_VALUE: u16 = 1;
/// Attribute with a verdict, inside a data attribute.
pub(super) const DATA_VERDICT: u16 = 2;

/// Type of a comment in user data; tables, sets and rules all use it. User data is a byte of type, a
/// byte of length, and the value, here a zero-terminated string.
const USERDATA_COMMENT: u8 = 0;
/// Greatest length of a comment in bytes, without its final zero.
pub(super) const COMMENT_BYTES: usize = 127;

/// Encodes a comment as user data. A longer comment is truncated.
pub(super) fn comment_to_userdata(comment: &str) -> Vec<u8> {
    let length = comment.len().min(COMMENT_BYTES);
    let mut data = vec![USERDATA_COMMENT, (length + 1) as u8];
    data.extend(comment.bytes().take(length));
    data.push(0);
    data
}

/// Returns the comment in user data, or `None` if it has none.
pub(super) fn comment_from_userdata(mut data: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = data {
        let (value, after) = rest.split_at_checked(usize::from(*length))?;
        if *kind == USERDATA_COMMENT {
            let text = value.strip_suffix(&[0]).unwrap_or(value);
            return Some(String::from_utf8_lossy(text).into_owned());
        }
        data = after;
    }
    None
}
