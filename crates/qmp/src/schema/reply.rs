//! Replies: a struct and its shape, declared together by [`reply!`](crate::reply).

use serde_json::{Map, Value as Json};

use super::Ty;

/// A type of a member of a reply.
pub trait Reply {
    /// Whether a member of this type may be absent.
    const OPTIONAL: bool;

    /// The type in the schema. A function, because types may hold themselves.
    fn ty() -> Ty;

    /// Whether the member is absent.
    fn is_absent(&self) -> bool;
}

macro_rules! plain {
    ($($t:ty => $ty:expr;)*) => {
        $(impl Reply for $t {
            const OPTIONAL: bool = false;
            fn ty() -> Ty {
                $ty
            }
            fn is_absent(&self) -> bool {
                false
            }
        })*
    };
}

plain! {
    u64 => Ty::Int;
    f64 => Ty::Number;
    bool => Ty::Bool;
    String => Ty::Str;
    &str => Ty::Str;
    Json => Ty::Any;
    Map<String, Json> => Ty::Any;
}

impl<T: Reply> Reply for Option<T> {
    const OPTIONAL: bool = true;
    fn ty() -> Ty {
        T::ty()
    }
    fn is_absent(&self) -> bool {
        self.is_none()
    }
}

impl<T: Reply> Reply for Box<T> {
    const OPTIONAL: bool = T::OPTIONAL;
    fn ty() -> Ty {
        T::ty()
    }
    fn is_absent(&self) -> bool {
        (**self).is_absent()
    }
}

impl<T: Reply> Reply for Vec<T> {
    const OPTIONAL: bool = false;
    fn ty() -> Ty {
        Ty::ArrayOf(T::ty)
    }
    fn is_absent(&self) -> bool {
        false
    }
}

/// Declares a reply: a struct with its members as clients see them, from which its serialisation and its shape derive, so
/// that the two can't drift apart.
///
/// A member is written `"name" field: Type`, in the order in which clients see the members; `Type = ty` gives it another type
/// of the schema than that of the field. Then, in this order: `always "name": ty = value` is a member that is the same in
/// every reply, `never "name": ty` one that other servers have, and `rest field` holds members that the shape does not
/// know.
#[macro_export]
macro_rules! reply {
    (
        $(#[$meta:meta])*
        $vis:vis struct $name:ident {
            $($(#[$field_meta:meta])* $member:literal $field:ident: $ty:ty $(= $as:expr)?,)*
            $(always $constant:literal: $constant_ty:expr => $value:expr,)*
            $(never $absent:literal: $absent_ty:expr,)*
            $(rest $rest:ident,)?
        }
    ) => {
        $(#[$meta])*
        $vis struct $name {
            $($(#[$field_meta])* $vis $field: $ty,)*
            $(
                /// Further members.
                $vis $rest: $crate::schema::JsonMap,
            )?
        }

        impl $name {
            /// The type in the schema.
            $vis const TY: $crate::schema::Ty = $crate::schema::Ty::Of(<$name as $crate::schema::Reply>::ty);
        }

        impl $crate::schema::Reply for $name {
            const OPTIONAL: bool = false;

            fn ty() -> $crate::schema::Ty {
                use $crate::schema::{Field, Reply, Shape, Ty};
                static SHAPE: Shape = Shape::of(&[
                    $(Field {
                        name: $member,
                        ty: $crate::reply!(@ty $ty $(= $as)?),
                        optional: <$ty as Reply>::OPTIONAL,
                    },)*
                    $(Field::required($constant, $constant_ty),)*
                    $(Field::optional($absent, $absent_ty),)*
                ]);
                Ty::Object(&SHAPE)
            }

            fn is_absent(&self) -> bool {
                false
            }
        }

        impl $crate::schema::Serialize for $name {
            fn serialize<S: $crate::schema::Serializer>(&self, s: S) -> ::std::result::Result<S::Ok, S::Error> {
                use $crate::schema::{Reply, SerializeMap};
                let mut out = s.serialize_map(None)?;
                $(if !Reply::is_absent(&self.$field) {
                    out.serialize_entry($member, &self.$field)?;
                })*
                $(out.serialize_entry($constant, &$value)?;)*
                $(for (name, value) in &self.$rest {
                    out.serialize_entry(name, value)?;
                })?
                out.end()
            }
        }
    };
    (@ty $ty:ty = $as:expr) => { $as };
    (@ty $ty:ty) => { Ty::Of(<$ty as Reply>::ty) };
}
