//! Expressions of a rule: each loads, compares or changes a value, or gives a verdict.
//!
//! Expressions work on registers. The kernel returns a rule's expressions as they were written, so that
//! a rule can be compared with the desired one. The values of a counter are decoded separately from
//! the expression that counts.

use towline_netlink::codec::{Attribute, Message, attributes};

use super::wire::{DATA_VALUE, DATA_VERDICT, LIST_ITEM};

/// Expression of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expression {
    /// Loads a property of the packet that is not in its bytes.
    Meta {
        /// Key of the property (`NFT_META_*`).
        key: u32,
        /// Register that the value is loaded into.
        register: u32,
    },
    /// Sets a property of the packet that is not in its bytes.
    SetMeta {
        /// Key of the property (`NFT_META_*`).
        key: u32,
        /// Register that holds the value.
        register: u32,
    },
    /// Loads bytes of the packet.
    Payload {
        /// Header that the offset counts from (`NFT_PAYLOAD_*_HEADER`).
        base: u32,
        /// Position in the header, in bytes.
        offset: u32,
        /// Number of bytes.
        length: u32,
        /// Register that the bytes are loaded into.
        register: u32,
    },
    /// Continues the rule if a comparison holds.
    Compare {
        /// Register that is compared.
        register: u32,
        /// Operator (`NFT_CMP_*`).
        operator: u32,
        /// Value to compare with.
        value: Vec<u8>,
    },
    /// Computes `target = (source & mask) ^ xor`.
    Bitwise {
        /// Register that holds the operand.
        source: u32,
        /// Register that the result is written to.
        target: u32,
        /// Mask with the length of the operand.
        mask: Vec<u8>,
        /// Value to XOR, with the length of the operand.
        xor: Vec<u8>,
    },
    /// Continues the rule if a set contains a value.
    Lookup {
        /// Name of the set.
        set: String,
        /// Register that holds the value.
        register: u32,
        /// Whether to continue only if the set does not contain the value.
        inverted: bool,
    },
    /// Loads a constant.
    Immediate {
        /// Register that the constant is loaded into.
        register: u32,
        /// Bytes of the constant.
        value: Vec<u8>,
    },
    /// Gives a verdict.
    Verdict(Verdict),
    /// Loads a property of the packet's connection.
    Ct {
        /// Key of the property (`NFT_CT_*`).
        key: u32,
        /// Register that the value is loaded into.
        register: u32,
    },
    /// Sets a property of the packet's connection.
    SetCt {
        /// Key of the property (`NFT_CT_*`).
        key: u32,
        /// Register that holds the value.
        register: u32,
    },
    /// Counts packets and bytes.
    Counter,
    /// Translates the source to the address of the output link.
    Masquerade {
        /// Flags of the translation (`NF_NAT_RANGE_*`).
        flags: u32,
    },
    /// Translates an address, and the port if there is one.
    Nat {
        /// Whether the destination is translated; otherwise the source.
        destination: bool,
        /// Address family (`NFPROTO_IPV4` or `NFPROTO_IPV6`).
        family: u32,
        /// Register that holds the new address.
        address: u32,
        /// Register that holds the new port.
        port: Option<u32>,
        /// Flags of the translation (`NF_NAT_RANGE_*`).
        flags: u32,
    },
    /// Drops the packet and answers with an error.
    Reject {
        /// Type of the answer (`NFT_REJECT_*`).
        kind: u32,
        /// Code of the ICMP message.
        code: u8,
    },
    /// Loads a property of the packet's route.
    Route {
        /// Key of the property (`NFT_RT_*`).
        key: u32,
        /// Register that the value is loaded into.
        register: u32,
    },
    /// Converts a number from host to network byte order.
    ByteOrder {
        /// Register whose value is converted in place.
        register: u32,
        /// Size of the number in bytes: 2 or 4.
        size: u32,
    },
    /// Writes a number into a TCP option of the packet, unless that would increase the number there.
    SetTcpOption {
        /// Kind of the option.
        option: u8,
        /// Offset in bytes from the option's start.
        offset: u32,
        /// Number of bytes.
        length: u32,
        /// Register that holds the bytes.
        register: u32,
    },
    /// Looks up an address of the packet in the routing tables.
    Fib {
        /// Flags that select the address and the lookup (`NFTA_FIB_F_*`).
        flags: u32,
        /// Type of the result (`NFT_FIB_RESULT_*`).
        result: u32,
        /// Register that the result is loaded into.
        register: u32,
    },
    /// Loads a random number below `modulus`.
    Random {
        /// Modulus, above 0.
        modulus: u32,
        /// Register that the number is loaded into.
        register: u32,
    },
    /// Adds a value to a dynamic set.
    Remember {
        /// Name of the set.
        set: String,
        /// Register that holds the value.
        register: u32,
        /// Timeout of the element in milliseconds, restarted whenever the value is added again; `None`
        /// if it has no timeout.
        expires: Option<u64>,
    },
    /// Removes a value from a dynamic set.
    Forget {
        /// Name of the set.
        set: String,
        /// Register that holds the value.
        register: u32,
    },
    /// Exempts the packet from conntrack.
    Notrack,
    /// Match of iptables (`xt_*`), encoded as iptables encodes it, which cannot list other expressions
    /// for the same purpose.
    Match {
        /// Name of the match, such as `conntrack`.
        name: String,
        /// Revision of the layout of `info`.
        revision: u32,
        /// Structure of the match, with padding.
        info: Vec<u8>,
    },
    /// Target of iptables (`xt_*`), as read from the kernel.
    Target {
        /// Name of the target, such as `REJECT`.
        name: String,
        /// Revision of the layout of `info`.
        revision: u32,
        /// Structure of the target, with padding.
        info: Vec<u8>,
    },
    /// Gives the verdict that a map has for a value. Without one, the rule does not continue.
    VerdictMap {
        /// Name of the map.
        set: String,
        /// Register that holds the value.
        register: u32,
    },
    /// Name of an unknown expression, as read from the kernel. It cannot be encoded.
    Other(String),
}

/// Verdict on a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Accepts the packet in this base chain. Later chains may still drop it.
    Accept,
    /// Drops the packet.
    Drop,
    /// Continues at the next rule of the calling chain.
    Return,
    /// Continues in the named chain, and returns after it.
    Jump(String),
    /// Continues in the named chain, without returning to this one.
    Goto(String),
}

pub(super) mod key {
    pub(crate) const META_MARK: u32 = libc::NFT_META_MARK as u32;
    pub(crate) const META_IIFNAME: u32 = libc::NFT_META_IIFNAME as u32;
    pub(crate) const META_OIFNAME: u32 = libc::NFT_META_OIFNAME as u32;
    pub(crate) const META_PROTOCOL: u32 = libc::NFT_META_PROTOCOL as u32;
    pub(crate) const META_IIF: u32 = libc::NFT_META_IIF as u32;
    pub(crate) const META_OIF: u32 = libc::NFT_META_OIF as u32;
    pub(crate) const META_PKTTYPE: u32 = libc::NFT_META_PKTTYPE as u32;
    pub(crate) const META_NFPROTO: u32 = libc::NFT_META_NFPROTO as u32;
    pub(crate) const META_L4PROTO: u32 = libc::NFT_META_L4PROTO as u32;
    pub(crate) const META_SKUID: u32 = libc::NFT_META_SKUID as u32;
    pub(crate) const CT_ID: u32 = 23;
    pub(crate) const CT_STATE: u32 = libc::NFT_CT_STATE as u32;
    #[cfg(test)]
    pub(crate) const CT_STATUS: u32 = libc::NFT_CT_STATUS as u32;
    pub(crate) const CT_MARK: u32 = libc::NFT_CT_MARK as u32;
    pub(crate) const CT_DIRECTION: u32 = libc::NFT_CT_DIRECTION as u32;
    pub(crate) const PAYLOAD_NETWORK: u32 = libc::NFT_PAYLOAD_NETWORK_HEADER as u32;
    pub(crate) const PAYLOAD_TRANSPORT: u32 = libc::NFT_PAYLOAD_TRANSPORT_HEADER as u32;
    pub(crate) const EQUAL: u32 = libc::NFT_CMP_EQ as u32;
    pub(crate) const NOT_EQUAL: u32 = libc::NFT_CMP_NEQ as u32;
    pub(crate) const LESS: u32 = libc::NFT_CMP_LT as u32;
    pub(crate) const NOT_LESS: u32 = libc::NFT_CMP_GTE as u32;
    pub(crate) const GREATER: u32 = libc::NFT_CMP_GT as u32;
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
    /// Appends the expression to a rule's list.
    pub(super) fn encode(&self, list: &mut Message) {
        list.nest(LIST_ITEM, |item| {
            item.string(NAME, self.name());
            if !matches!(self, Self::Notrack) {
                item.nest(DATA, |data| self.encode_data(data));
            }
        });
    }

    /// Returns the kernel's name of the expression.
    pub fn name(&self) -> &str {
        match self {
            Self::Meta { .. } | Self::SetMeta { .. } => "meta",
            Self::Payload { .. } => "payload",
            Self::Compare { .. } => "cmp",
            Self::Bitwise { .. } => "bitwise",
            Self::Lookup { .. } | Self::VerdictMap { .. } => "lookup",
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
            Self::Target { .. } => "target",
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
            Self::Match { name, revision, info } | Self::Target { name, revision, info } => {
                data.string(1, name).u32_be(2, *revision).bytes(3, info);
            }
            Self::VerdictMap { set, register } => {
                data.string(1, set).u32_be(2, *register).u32_be(3, REGISTER_VERDICT);
            }
            Self::Counter | Self::Notrack | Self::Other(_) => {}
        }
    }

    /// Decodes an expression of a rule's list. For a counter, also returns its packets and bytes.
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
            // A payload expression that writes has no target register.
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
            "lookup" if fields.number(3) == Some(REGISTER_VERDICT) => {
                Self::VerdictMap { set: fields.get(1)?.string(), register: fields.number(2)? }
            }
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
            "match" | "target" => {
                let (called, revision) = (fields.get(1)?.string(), fields.number(2)?);
                let info = fields.get(3)?.value.to_vec();
                match name {
                    "match" => Self::Match { name: called, revision, info },
                    _ => Self::Target { name: called, revision, info },
                }
            }
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

    pub(super) fn decode(data: Attribute<'_>) -> Option<Self> {
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

/// Attributes of one expression.
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
