"""Containers: which formats are opened, and how.

What could make a decoder read other files, a device or the network is not among them: playlists, concatenations,
sequences of pictures, session descriptions, SVG; nor what would be guessed at: samples without a header, and text that
is drawn as a picture.
"""

from pathlib import Path

import av
from av.container import InputContainer

from lowvram_kernels.errors import InputError

# Names of libavformat's demuxers.
_CONTAINERS = (
    "3g2,3gp,asf,asf_o,avi,dhav,dv,flv,gxf,iff,ivr,kux,live_flv,m4a,matroska,mj2,mov,mp4,mpeg,mpegts,mpegtsraw,mxf,nsv,"
    "nut,nuv,pva,rm,swf,ty,vivo,webm,wtv,xmv"
)
_SOUNDS = (
    "act,adx,aea,aiff,amr,ape,ast,au,avr,bfstm,bonk,brstm,caf,codec2,dsf,dss,epaf,flac,g729,hca,hcom,iamf,ilbc,ircam,"
    "laf,lc3,mmf,mpc,mpc8,nistsphere,nsp,ogg,oma,osq,pvf,qcp,qoa,rka,rso,sds,sdx,shn,siff,sln,sol,sox,tak,tta,voc,vqf,"
    "w64,wav,wavarc,wsaud,wsd,wv,wve,xa,xwma"
)
_RAW_SOUNDS = (
    "aac,ac3,ac4,amrnb,amrwb,aptx,aptx_hd,dts,dtshd,eac3,g722,g723_1,g726,g726le,g728,gsm,loas,mlp,mp3,s337m,sbc,spdif,"
    "truehd"
)
_PICTURES = (
    "apng,bmp_pipe,dds_pipe,dpx_pipe,exr_pipe,fits,flic,gem_pipe,gif,gif_pipe,hdr_pipe,ico,j2k_pipe,jpeg_pipe,"
    "jpegls_pipe,jpegxl_anim,jpegxl_pipe,jpegxs_pipe,msp,pam_pipe,pbm_pipe,pcx_pipe,pfm_pipe,pgm_pipe,pgx_pipe,phm_pipe,"
    "png_pipe,ppm_pipe,psd_pipe,qoi_pipe,sgi_pipe,sunrast_pipe,tiff_pipe,webp_pipe,xbm_pipe,xpm_pipe,xwd_pipe"
)
_RAW_PICTURES = "apv,av1,cavsvideo,dirac,dnxhd,evc,h261,h263,h264,hevc,ivf,m4v,mjpeg,mpegvideo,obu,vc1,vvc,yuv4mpegpipe"
WITH_SOUND = f"{_CONTAINERS},{_SOUNDS},{_RAW_SOUNDS}"
WITH_PICTURES = f"{_CONTAINERS},{_PICTURES},{_RAW_PICTURES}"


def open_media(path: Path, demuxers: str, what: str, expected: str) -> InputContainer:
    """Open a file that one of ``demuxers`` reads; ``what`` it is to be and ``expected`` are for the error.

    Raises:
        InputError: missing, or of none of these formats.
    """
    if not path.is_file():
        raise InputError(f"{what} {path} is not a file: {expected}; check the path")
    options = {"format_whitelist": demuxers, "protocol_whitelist": "file"}
    try:
        return av.open(f"file:{path.absolute()}", options=options, metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise InputError(
            f"{what} {path} cannot be read ({reason(error)}): {expected}, whole; copy it again or convert it first"
        ) from error


def reason(error: Exception) -> str:
    """What went wrong, without the path that libraries put beside it."""
    return getattr(error, "strerror", None) or str(error)
