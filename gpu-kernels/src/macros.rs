//! The macros kernels are written with: [`unroll`], [`kernels`], [`smem`], and `twin` for the device layer.

/// A function with two bodies: `ptx` for the device, `host` for the emulator.
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
macro_rules! twin {
    ($(#[$meta:meta])* pub fn $name:ident $(<$(const $C:ident : $CT:ty),+>)? ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)?
        { ptx $ptx:block host $host:block }) => {
        $(#[$meta])*
        #[inline(always)]
        #[track_caller]
        pub fn $name $(<$(const $C: $CT),+>)? ($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "nvptx64")]
            $ptx
            #[cfg(not(target_arch = "nvptx64"))]
            $host
        }
    };
}

/// A loop unrolled in the source: the index is a constant in every copy, so arrays that it indexes stay in registers.
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
macro_rules! unroll {
    ($i:ident in 0..1 $body:block) => { unroll!(@ $i $body 0) };
    ($i:ident in 0..2 $body:block) => { unroll!(@ $i $body 0 1) };
    ($i:ident in 0..4 $body:block) => { unroll!(@ $i $body 0 1 2 3) };
    ($i:ident in 0..8 $body:block) => { unroll!(@ $i $body 0 1 2 3 4 5 6 7) };
    ($i:ident in 0..16 $body:block) => { unroll!(@ $i $body 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15) };
    (@ $i:ident $body:block $($n:literal)*) => { copies!($i $body $($n)*) };
}

/// The copies of [`unroll`]; on the host one loop, which compiles in a fraction of the time.
#[cfg(target_arch = "nvptx64")]
macro_rules! copies {
    ($i:ident $body:block $($n:literal)*) => {{ $({ const $i: usize = $n; $body })* }};
}
#[cfg(all(not(target_arch = "nvptx64"), feature = "emu"))]
macro_rules! copies {
    ($i:ident $body:block $($n:literal)*) => {{
        for i in [$($n),*] {
            #[allow(non_snake_case)] // a constant on the device
            let $i: usize = i;
            $body
        }
    }};
}

/// Kernel entries: the name of the file, the threads per CTA (and, after a comma, the CTAs that an SM should hold), a
/// signature, and the functions that have it. Functions of a table marked `early` wait for earlier launches themselves
/// (`device/grid.rs`); for all others it is done at the start.
///
/// On the device each becomes an `extern "ptx-kernel"` function of the given name with the launch bounds, in the module
/// of the file that is named; for the emulator `$table` lists them with code that reads the arguments from a launch's
/// parameters.
#[cfg(any(target_arch = "nvptx64", feature = "emu"))]
macro_rules! kernels {
    (in $file:literal; $(#[$meta:meta])* $vis:vis $table:ident: threads $bounds:tt;
        fn $args:tt;
        $($name:expr => $function:expr;)+) => {
        kernels! { @table waiting, in $file; $(#[$meta])* $vis $table: threads $bounds; fn $args; $($name => $function;)+ }
    };
    (in $file:literal; $(#[$meta:meta])* $vis:vis $table:ident: threads $bounds:tt, early;
        fn $args:tt;
        $($name:expr => $function:expr;)+) => {
        kernels! { @table early, in $file; $(#[$meta])* $vis $table: threads $bounds; fn $args; $($name => $function;)+ }
    };
    (@table $start:ident, in $file:literal; $(#[$meta:meta])* $vis:vis $table:ident: threads $bounds:tt;
        fn $args:tt;
        $($name:expr => $function:expr;)+) => {
        // The PTX build compiles one file's entries at a time.
        $(
            #[cfg(all(target_arch = "nvptx64", entries_of = $file))]
            kernels! { @device $start $bounds $args $name, $function }
        )+

        $(#[$meta])*
        #[cfg(feature = "emu")]
        $vis const $table: &[$crate::emu::Entry] = &[
            $(kernels! { @host $start $bounds $args $name, $function }),+
        ];
    };
    (@device $start:ident ($threads:literal $(, $ctas:literal)?) ($($arg:ident : $ty:ty),* $(,)?) $name:expr, $function:expr) => {
        const _: () = {
            #[unsafe(export_name = $name)]
            unsafe extern "ptx-kernel" fn entry($($arg: $ty),*) {
                // SAFETY: a comment, no instruction; the PTX build turns it into a directive.
                unsafe {
                    core::arch::asm!(
                        concat!("// @launch .maxntid ", $threads, ",1,1" $(, " .minnctapersm ", $ctas)?),
                        options(nomem, nostack, preserves_flags)
                    )
                }
                $crate::device::grid::let_later_start();
                kernels! { @start $start }
                $function($($arg),*)
            }
        };
    };
    (@host $start:ident ($threads:literal $(, $ctas:literal)?) ($($arg:ident : $ty:ty),* $(,)?) $name:expr, $function:expr) => {
        $crate::emu::Entry {
            name: $name,
            max_threads: $threads,
            run: |params| {
                $(let $arg: $ty = params.take();)*
                kernels! { @start $start }
                $function($($arg),*)
            },
            params_bytes: || {
                let mut layout = $crate::launch::ParamLayout::default();
                $(layout.add::<$ty>();)*
                layout.bytes()
            },
        }
    };
    (@start waiting) => { $crate::device::grid::wait_for_earlier(); };
    (@start early) => {};
    ($table:ident: $($rest:tt)*) => {
        compile_error!("kernels!: the name of this file comes first: kernels! { in \"mmvq\"; ENTRIES: threads(128); …");
    };
}

/// The layout of a CTA's dynamic shared memory: `smem! { struct Tile { a: [f32; 32], b: [U32x4; 64] } }` gives
/// `Tile::BYTES` for the launcher and, for the kernel, `Tile::a()` and `Tile::b()`, arrays that do not overlap.
macro_rules! smem {
    ($(#[$meta:meta])* $vis:vis struct $name:ident { $($(#[$field_meta:meta])* $field:ident: [$ty:ty; $elems:expr]),* $(,)? }) => {
        $(#[$meta])*
        #[repr(C)]
        $vis struct $name { $($field: [$ty; $elems]),* }

        impl $name {
            /// Bytes of the whole layout.
            $vis const BYTES: u32 = size_of::<$name>() as u32;
            $(
                $(#[$field_meta])*
                #[cfg(any(target_arch = "nvptx64", feature = "emu"))]
                #[inline(always)]
                $vis fn $field() -> $crate::device::Smem<$ty> {
                    $crate::device::Smem::dynamic(core::mem::offset_of!($name, $field) as u32, $elems as u32)
                }
            )*
        }
    };
}

/// Calls `$callback! { ID => module, … }` with the block formats that models use for weights, which leaves out those of
/// activations.
macro_rules! for_each_weight_format {
    ($callback:ident) => { quant::for_each_block_format!(for_each_weight_format![$callback]); };
    ([$callback:ident] $($rows:tt)*) => { for_each_weight_format! { @keep $callback [] $($rows)* } };
    (@keep $callback:ident [$($kept:tt)*] Q8_1 => $module:ident :: Block, $($rest:tt)*) => {
        for_each_weight_format! { @keep $callback [$($kept)*] $($rest)* }
    };
    (@keep $callback:ident [$($kept:tt)*] Q8_K => $module:ident :: Block, $($rest:tt)*) => {
        for_each_weight_format! { @keep $callback [$($kept)*] $($rest)* }
    };
    (@keep $callback:ident [$($kept:tt)*] $id:ident => $module:ident :: Block, $($rest:tt)*) => {
        for_each_weight_format! { @keep $callback [$($kept)* $id => $module,] $($rest)* }
    };
    (@keep $callback:ident [$($kept:tt)*]) => { $callback! { $($kept)* } };
}
