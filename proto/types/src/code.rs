//! Stable codes of what operators read: reasons, problems, conflicts, notes and states.
//!
//! The text of a message may change between versions. Its code does not, so programs compare codes.
//! `docs/troubleshooting.md` has a line for each.

/// Value with a stable code.
pub trait Coded {
    /// Returns the code of the value: a few words in kebab case, such as `link-missing`.
    fn code(&self) -> &'static str;

    /// Returns every code that a value of this type can have.
    fn codes() -> Vec<&'static str>
    where
        Self: Sized;
}

/// Implements [`Coded`] for an enum. Each variant has a code, or takes that of the
/// value that it holds, alone or in a field. A variant that is not listed does not compile. A struct has
/// one code, or takes that of one of its fields.
///
/// ```
/// use towline_types::code::Coded as _;
///
/// enum Part {
///     Link,
///     Route,
/// }
///
/// enum Problem {
///     Missing { name: String },
///     Refused { part: Part, errno: i32 },
///     Other(Part),
/// }
///
/// towline_types::codes! { Part { Link => "link-refused", Route => "route-refused" } }
/// towline_types::codes! { Problem { Missing => "missing", Refused { part: Part }, Other(Part) } }
///
/// assert_eq!(Problem::Missing { name: "a".to_owned() }.code(), "missing");
/// assert_eq!(Problem::Refused { part: Part::Route, errno: 1 }.code(), "route-refused");
/// assert_eq!(Problem::Other(Part::Link).code(), "link-refused");
/// assert!(Problem::codes().contains(&"route-refused"));
///
/// struct Full;
///
/// struct Report {
///     problem: Problem,
/// }
///
/// towline_types::codes! { Full => "disk-full" }
/// towline_types::codes! { Report.problem: Problem }
/// assert_eq!(Report { problem: Problem::Other(Part::Link) }.code(), "link-refused");
/// ```
#[macro_export]
macro_rules! codes {
    ($type:ty { $(
        $variant:ident
        $(=> $code:literal)?
        $(($inner:ty))?
        $({ $field:ident: $held:ty })?
    ),+ $(,)? }) => {
        impl $crate::code::Coded for $type {
            fn code(&self) -> &'static str {
                match self { $(
                    $( Self::$variant { .. } => $code, )?
                    $( Self::$variant(inner) => <$inner as $crate::code::Coded>::code(inner), )?
                    $( Self::$variant { $field, .. } => <$held as $crate::code::Coded>::code($field), )?
                )+ }
            }

            fn codes() -> ::std::vec::Vec<&'static str> {
                [ $(
                    $( ::std::vec![$code] )?
                    $( <$inner as $crate::code::Coded>::codes() )?
                    $( <$held as $crate::code::Coded>::codes() )?
                ),+ ].concat()
            }
        }
    };
    ($type:ty => $code:literal) => {
        impl $crate::code::Coded for $type {
            fn code(&self) -> &'static str {
                $code
            }

            fn codes() -> ::std::vec::Vec<&'static str> {
                ::std::vec![$code]
            }
        }
    };
    ($type:ident.$field:ident: $held:ty) => {
        impl $crate::code::Coded for $type {
            fn code(&self) -> &'static str {
                <$held as $crate::code::Coded>::code(&self.$field)
            }

            fn codes() -> ::std::vec::Vec<&'static str> {
                <$held as $crate::code::Coded>::codes()
            }
        }
    };
}
