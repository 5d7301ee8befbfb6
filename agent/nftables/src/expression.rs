//! The steps of a rule: each loads, compares, changes or decides.
//!
//! A rule's steps work on registers. What the kernel reads back is the same steps, so that a
//! rule can be compared with the one that was wanted; counters' values are told apart from the
//! step that counts.

use towline_netlink::codec::{Attribute, Message, attributes};

use super::wire::{DATA_VALUE, DATA_VERDICT, LIST_ITEM};

/// One step of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expression {
    /// Loads something that the kernel knows of the packet.
    Meta {
        /// `NFT_META_*`.
        key: u32,
        /// Where to.
        register: u32,
    },
    /// Sets it.
    SetMeta {
        /// `NFT_META_*`.
        key: u32,
        /// Where from.
        register: u32,
    },
    /// Loads bytes of the packet.
    Payload {
        /// `NFT_PAYLOAD_*_HEADER`.
        base: u32,
        /// Bytes from there.
        offset: u32,
        /// How many bytes.
        length: u32,
        /// Where to.
        register: u32,
    },
    /// Goes on if the comparison holds.
    Compare {
        /// What.
        register: u32,
        /// `NFT_CMP_*`.
        operator: u32,
        /// With what.
        value: Vec<u8>,
    },
    /// `target = (source & mask) ^ xor`.
    Bitwise {
        /// Where from.
        source: u32,
        /// Where to.
        target: u32,
        /// As long as the value.
        mask: Vec<u8>,
        /// As long as the value.
        xor: Vec<u8>,
    },
    /// Goes on if a set holds the value (or, inverted, does not).
    Lookup {
        /// The set's name.
        set: String,
        /// What.
        register: u32,
        /// Goes on if it does not hold it.
        inverted: bool,
    },
    /// Loads a constant.
    Immediate {
        /// Where to.
        register: u32,
        /// What.
        value: Vec<u8>,
    },
    /// Decides.
    Verdict(Verdict),
    /// Loads something of the packet's connection.
    Ct {
        /// `NFT_CT_*`.
        key: u32,
        /// Where to.
        register: u32,
    },
    /// Sets it.
    SetCt {
        /// `NFT_CT_*`.
        key: u32,
        /// Where from.
        register: u32,
    },
    /// Counts packets and bytes.
    Counter,
    /// Translates the source to the address of the link by which the packet leaves.
    Masquerade {
        /// `NF_NAT_RANGE_*`.
        flags: u32,
    },
    /// Translates an address, and the port if there is one.
    Nat {
        /// The destination instead of the source.
        destination: bool,
        /// `NFPROTO_IPV4` or `NFPROTO_IPV6`.
        family: u32,
        /// Holds the address.
        address: u32,
        /// Holds the port.
        port: Option<u32>,
        /// `NF_NAT_RANGE_*`.
        flags: u32,
    },
    /// Answers with an error and drops.
    Reject {
        /// `NFT_REJECT_*`.
        kind: u32,
        /// Of the ICMP message.
        code: u8,
    },
    /// Loads something of the packet's route.
    Route {
        /// `NFT_RT_*`.
        key: u32,
        /// Where to.
        register: u32,
    },
    /// Turns a number from host to network order.
    ByteOrder {
        /// The value is replaced.
        register: u32,
        /// Bytes of the number: 2 or 4.
        size: u32,
    },
    /// Writes into a TCP option of the packet, which is never made larger by that.
    SetTcpOption {
        /// The option's kind.
        option: u8,
        /// Bytes from the option's start.
        offset: u32,
        /// How many bytes.
        length: u32,
        /// Where from.
        register: u32,
    },
    /// Looks an address of the packet up in the routing tables.
    Fib {
        /// `NFTA_FIB_F_*`.
        flags: u32,
        /// `NFT_FIB_RESULT_*`.
        result: u32,
        /// Where to.
        register: u32,
    },
    /// Loads a random number below `modulus`.
    Random {
        /// Above 0.
        modulus: u32,
        /// Where to.
        register: u32,
    },
    /// Adds a value to a dynamic set.
    Remember {
        /// The set's name.
        set: String,
        /// What.
        register: u32,
        /// Milliseconds after which it is gone, counted from the last time that it was added;
        /// `None`: it stays.
        expires: Option<u64>,
    },
    /// Takes a value out of a dynamic set.
    Forget {
        /// The set's name.
        set: String,
        /// What.
        register: u32,
    },
    /// Leaves the packet out of connection tracking.
    Notrack,
    /// A match of iptables (`xt_*`), as its own programs write it: other expressions they cannot list.
    Match {
        /// Such as `conntrack`.
        name: String,
        /// Which layout of `info`.
        revision: u32,
        /// The match's structure, with padding.
        info: Vec<u8>,
    },
    /// One that this module does not know, as read; it cannot be written.
    Other(String),
}

/// The end of a packet's way through a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It passes this hook's chain.
    Accept,
    /// It is gone.
    Drop,
    /// On to the next rule of the calling chain.
    Return,
    /// Through another chain, and back.
    Jump(String),
    /// Through another chain, not back.
    Goto(String),
}

pub(super) mod key {
    pub(crate) const META_MARK: u32 = libc::NFT_META_MARK as u32;
    pub(crate) const META_IIFNAME: u32 = libc::NFT_META_IIFNAME as u32;
    pub(crate) const META_OIFNAME: u32 = libc::NFT_META_OIFNAME as u32;
    pub(crate) const META_NFPROTO: u32 = libc::NFT_META_NFPROTO as u32;
    pub(crate) const META_L4PROTO: u32 = libc::NFT_META_L4PROTO as u32;
    pub(crate) const META_SKUID: u32 = libc::NFT_META_SKUID as u32;
    pub(crate) const CT_ID: u32 = 23;
    pub(crate) const CT_STATE: u32 = libc::NFT_CT_STATE as u32;
    pub(crate) const CT_MARK: u32 = libc::NFT_CT_MARK as u32;
    pub(crate) const CT_DIRECTION: u32 = libc::NFT_CT_DIRECTION as u32;
    pub(crate) const PAYLOAD_NETWORK: u32 = libc::NFT_PAYLOAD_NETWORK_HEADER as u32;
    pub(crate) const PAYLOAD_TRANSPORT: u32 = libc::NFT_PAYLOAD_TRANSPORT_HEADER as u32;
    pub(crate) const EQUAL: u32 = libc::NFT_CMP_EQ as u32;
    pub(crate) const NOT_EQUAL: u32 = libc::NFT_CMP_NEQ as u32;
    pub(crate) const LESS: u32 = libc::NFT_CMP_LT as u32;
    pub(crate) const NOT_LESS: u32 = libc::NFT_CMP_GTE as u32;
    pub(crate) const NOT_GREATER: u32 = libc::NFT_CMP_LTE as u32;
    pub(crate) const ROUTE_TCP_MSS: u32 = 3;
    pub(crate) const FIB_LINK: u32 = 1;
    pub(crate) const FIB_ADDRESS_TYPE: u32 = 3;
    pub(crate) const FIB_SOURCE: u32 = 1;
    pub(crate) const FIB_DESTINATION: u32 = 2;
    pub(crate) const FIB_BY_INPUT: u32 = 1 << 3;
    pub(crate) const NAT_RANDOM_FULLY: u32 = 1 << 4;
    pub(crate) const REJECT_ICMPX: u32 = libc::NFT_REJECT_ICMPX_UNREACH as u32;
    pub(crate) const REJECT_TCP_RESET: u32 = libc::NFT_REJECT_TCP_RST as u32;
    pub(crate) const REGISTER_VERDICT: u32 = libc::NFT_REG_VERDICT as u32;
    pub(crate) const REGISTER_1: u32 = libc::NFT_REG_1 as u32;
    pub(crate) const REGISTER_2: u32 = libc::NFT_REG_2 as u32;
}
use key::REGISTER_VERDICT;

const NAME: u16 = 1;
const DATA: u16 = 2;
const TCP_OPTION_OPERATION: u32 = 1;
const LOOKUP_INVERTED: u32 = 1;
const RANDOM: u32 = 1;
const DYNSET_ADD: u32 = 0;
const DYNSET_UPDATE: u32 = 1;
const DYNSET_DELETE: u32 = 2;
const HOST_TO_NETWORK: u32 = 1;

impl Expression {
    /// Appends it to a rule's list.
    pub(super) fn encode(&self, list: &mut Message) {
        list.nest(LIST_ITEM, |item| {
            item.string(NAME, self.name());
            if !matches!(self, Self::Notrack) {
                item.nest(DATA, |data| self.encode_data(data));
            }
        });
    }

    /// Its name in the kernel.
    pub fn name(&self) -> &str {
        match self {
            Self::Meta { .. } | Self::SetMeta { .. } => "meta",
            Self::Payload { .. } => "payload",
            Self::Compare { .. } => "cmp",
            Self::Bitwise { .. } => "bitwise",
            Self::Lookup { .. } => "lookup",
            Self::Immediate { .. } | Self::Verdict(_) => "immediate",
            Self::Ct { .. } | Self::SetCt { .. } => "ct",
            Self::Counter => "counter",
            Self::Masquerade { .. } => "masq",
            Self::Nat { .. } => "nat",
            Self::Reject { .. } => "reject",
            Self::Route { .. } => "rt",
            Self::ByteOrder { .. } => "byteorder",
            Self::SetTcpOption { .. } => "exthdr",
            Self::Fib { .. } => "fib",
            Self::Random { .. } => "numgen",
            Self::Remember { .. } | Self::Forget { .. } => "dynset",
            Self::Notrack => "notrack",
            Self::Match { .. } => "match",
            Self::Other(name) => name,
        }
    }

    fn encode_data(&self, data: &mut Message) {
        match self {
            Self::Meta { key, register } => {
                data.u32_be(1, *register).u32_be(2, *key);
            }
            Self::SetMeta { key, register } => {
                data.u32_be(2, *key).u32_be(3, *register);
            }
            Self::Payload { base, offset, length, register } => {
                data.u32_be(1, *register).u32_be(2, *base).u32_be(3, *offset).u32_be(4, *length);
            }
            Self::Compare { register, operator, value } => {
                data.u32_be(1, *register).u32_be(2, *operator);
                put_value(data, 3, value);
            }
            Self::Bitwise { source, target, mask, xor } => {
                data.u32_be(1, *source).u32_be(2, *target).u32_be(3, mask.len() as u32);
                put_value(data, 4, mask);
                put_value(data, 5, xor);
            }
            Self::Lookup { set, register, inverted } => {
                data.string(1, set).u32_be(2, *register);
                data.u32_be(5, if *inverted { LOOKUP_INVERTED } else { 0 });
            }
            Self::Immediate { register, value } => {
                data.u32_be(1, *register);
                put_value(data, 2, value);
            }
            Self::Verdict(verdict) => {
                data.u32_be(1, REGISTER_VERDICT).nest(2, |value| {
                    value.nest(DATA_VERDICT, |inner| verdict.encode(inner));
                });
            }
            Self::Ct { key, register } => {
                data.u32_be(1, *register).u32_be(2, *key);
            }
            Self::SetCt { key, register } => {
                data.u32_be(2, *key).u32_be(4, *register);
            }
            Self::Masquerade { flags } => {
                if *flags != 0 {
                    data.u32_be(1, *flags);
                }
            }
            Self::Nat { destination, family, address, port, flags } => {
                data.u32_be(1, u32::from(*destination)).u32_be(2, *family).u32_be(3, *address);
                if let Some(port) = port {
                    data.u32_be(5, *port);
                }
                if *flags != 0 {
                    data.u32_be(7, *flags);
                }
            }
            Self::Reject { kind, code } => {
                data.u32_be(1, *kind).u8(2, *code);
            }
            Self::Route { key, register } => {
                data.u32_be(1, *register).u32_be(2, *key);
            }
            Self::ByteOrder { register, size } => {
                data.u32_be(1, *register).u32_be(2, *register).u32_be(3, HOST_TO_NETWORK);
                data.u32_be(4, *size).u32_be(5, *size);
            }
            Self::SetTcpOption { option, offset, length, register } => {
                data.u8(2, *option).u32_be(3, *offset).u32_be(4, *length);
                data.u32_be(6, TCP_OPTION_OPERATION).u32_be(7, *register);
            }
            Self::Fib { flags, result, register } => {
                data.u32_be(1, *register).u32_be(2, *result).u32_be(3, *flags);
            }
            Self::Random { modulus, register } => {
                data.u32_be(1, *register).u32_be(2, *modulus).u32_be(3, RANDOM);
            }
            Self::Remember { set, register, expires: None } => {
                data.string(1, set).u32_be(3, DYNSET_ADD).u32_be(4, *register);
            }
            Self::Remember { set, register, expires: Some(milliseconds) } => {
                data.string(1, set).u32_be(3, DYNSET_UPDATE).u32_be(4, *register);
                data.u64_be(6, *milliseconds);
            }
            Self::Forget { set, register } => {
                data.string(1, set).u32_be(3, DYNSET_DELETE).u32_be(4, *register);
            }
            Self::Match { name, revision, info } => {
                data.string(1, name).u32_be(2, *revision).bytes(3, info);
            }
            Self::Counter | Self::Notrack | Self::Other(_) => {}
        }
    }

    /// Reads one from a rule's list; with it, a counter's packets and bytes.
    pub(super) fn decode(item: Attribute<'_>) -> (Self, Option<(u64, u64)>) {
        let mut name = String::new();
        let mut data: &[u8] = &[];
        for attribute in item.nested() {
            match attribute.kind {
                NAME => name = attribute.string(),
                DATA => data = attribute.value,
                _ => {}
            }
        }
        let fields = Fields(data);
        if name == "counter" {
            let number = |kind| fields.get(kind).and_then(|a| a.u64_be()).unwrap_or(0);
            return (Self::Counter, Some((number(2), number(1))));
        }
        (Self::decode_data(&name, &fields).unwrap_or(Self::Other(name)), None)
    }

    fn decode_data(name: &str, fields: &Fields<'_>) -> Option<Self> {
        Some(match name {
            "meta" => match (fields.number(1), fields.number(3)) {
                (Some(register), None) => Self::Meta { key: fields.number(2)?, register },
                (None, Some(register)) => Self::SetMeta { key: fields.number(2)?, register },
                _ => return None,
            },
            // One that writes has no target register.
            "payload" => Self::Payload {
                register: fields.number(1)?,
                base: fields.number(2)?,
                offset: fields.number(3)?,
                length: fields.number(4)?,
            },
            "cmp" => Self::Compare {
                register: fields.number(1)?,
                operator: fields.number(2)?,
                value: fields.value(3)?,
            },
            "bitwise" => Self::Bitwise {
                source: fields.number(1)?,
                target: fields.number(2)?,
                mask: fields.value(4)?,
                xor: fields.value(5)?,
            },
            "lookup" if fields.number(3).is_none() => Self::Lookup {
                set: fields.get(1)?.string(),
                register: fields.number(2)?,
                inverted: fields.number(5).unwrap_or(0) & LOOKUP_INVERTED != 0,
            },
            "immediate" if fields.number(1)? == REGISTER_VERDICT => {
                let verdict = fields.get(2)?.nested().find(|a| a.kind == DATA_VERDICT)?;
                Self::Verdict(Verdict::decode(verdict)?)
            }
            "immediate" => Self::Immediate { register: fields.number(1)?, value: fields.value(2)? },
            "ct" => match (fields.number(1), fields.number(4)) {
                (Some(register), None) => Self::Ct { key: fields.number(2)?, register },
                (None, Some(register)) => Self::SetCt { key: fields.number(2)?, register },
                _ => return None,
            },
            "masq" if fields.number(2).is_none() => {
                Self::Masquerade { flags: fields.number(1).unwrap_or(0) }
            }
            "nat" => Self::Nat {
                destination: fields.number(1)? == 1,
                family: fields.number(2)?,
                address: fields.number(3)?,
                port: fields.number(5),
                flags: fields.number(7).unwrap_or(0) & key::NAT_RANDOM_FULLY,
            },
            "reject" => Self::Reject {
                kind: fields.number(1)?,
                code: fields.get(2).and_then(|a| a.u8()).unwrap_or(0),
            },
            "rt" => Self::Route { register: fields.number(1)?, key: fields.number(2)? },
            "byteorder" if fields.number(1) == fields.number(2) => {
                Self::ByteOrder { register: fields.number(1)?, size: fields.number(5)? }
            }
            "exthdr" if fields.number(6)? == TCP_OPTION_OPERATION => Self::SetTcpOption {
                option: fields.get(2)?.u8()?,
                offset: fields.number(3)?,
                length: fields.number(4)?,
                register: fields.number(7)?,
            },
            "fib" => Self::Fib {
                register: fields.number(1)?,
                result: fields.number(2)?,
                flags: fields.number(3)?,
            },
            "numgen" if fields.number(3)? == RANDOM => {
                Self::Random { register: fields.number(1)?, modulus: fields.number(2)? }
            }
            "dynset" => {
                let (set, register) = (fields.get(1)?.string(), fields.number(4)?);
                match fields.number(3)? {
                    DYNSET_ADD => Self::Remember { set, register, expires: None },
                    DYNSET_UPDATE => {
                        let expires = fields.get(6)?.u64_be();
                        Self::Remember { set, register, expires }
                    }
                    DYNSET_DELETE => Self::Forget { set, register },
                    _ => return None,
                }
            }
            "notrack" => Self::Notrack,
            "match" => Self::Match {
                name: fields.get(1)?.string(),
                revision: fields.number(2)?,
                info: fields.get(3)?.value.to_vec(),
            },
            _ => return None,
        })
    }
}

impl Verdict {
    fn encode(&self, data: &mut Message) {
        let (code, chain) = match self {
            Self::Accept => (libc::NF_ACCEPT, None),
            Self::Drop => (libc::NF_DROP, None),
            Self::Return => (libc::NFT_RETURN, None),
            Self::Jump(chain) => (libc::NFT_JUMP, Some(chain)),
            Self::Goto(chain) => (libc::NFT_GOTO, Some(chain)),
        };
        data.u32_be(1, code as u32);
        if let Some(chain) = chain {
            data.string(2, chain);
        }
    }

    fn decode(data: Attribute<'_>) -> Option<Self> {
        let fields = Fields(data.value);
        let chain = || Some(fields.get(2)?.string());
        Some(match fields.number(1)? as i32 {
            libc::NF_ACCEPT => Self::Accept,
            libc::NF_DROP => Self::Drop,
            libc::NFT_RETURN => Self::Return,
            libc::NFT_JUMP => Self::Jump(chain()?),
            libc::NFT_GOTO => Self::Goto(chain()?),
            _ => return None,
        })
    }
}

fn put_value(data: &mut Message, kind: u16, value: &[u8]) {
    data.nest(kind, |inner| {
        inner.bytes(DATA_VALUE, value);
    });
}

/// The attributes of one expression.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn get(&self, kind: u16) -> Option<Attribute<'a>> {
        attributes(self.0, 0).find(|attribute| attribute.kind == kind)
    }

    fn number(&self, kind: u16) -> Option<u32> {
        self.get(kind)?.u32_be()
    }

    fn value(&self, kind: u16) -> Option<Vec<u8>> {
        let value = self.get(kind)?.nested().find(|inner| inner.kind == DATA_VALUE)?;
        Some(value.value.to_vec())
    }
}
